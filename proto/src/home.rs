//! The home folder in paths: `~` and `~/...` mean it in every option and in the job file, as in a shell.
//!
//! A shell replaces `~` only at the beginning of a word: not in `--set data.path=~/pictures`, nor in
//! `--out=~/film.gif`, nor behind the kind in `--data folder:~/pictures`.

use std::ffi::OsString;

/// Returns a path with `~` replaced by the home folder, if there is one.
pub fn expanded(path: &str) -> String {
    within(path, home().as_deref())
}

/// Arguments of this process, with `~` replaced at the beginning of each path in them.
pub fn arguments() -> Vec<OsString> {
    let home = home();
    std::env::args_os().map(|argument| in_argument(argument, home.as_deref())).collect()
}

fn home() -> Option<String> {
    std::env::var("HOME").ok().filter(|home| home.starts_with('/'))
}

fn within(path: &str, home: Option<&str>) -> String {
    let below = path.strip_prefix('~').filter(|below| below.is_empty() || below.starts_with('/'));
    match (below, home) {
        (Some(below), Some(home)) => format!("{}{below}", home.trim_end_matches('/')),
        // `~name` is another user's folder for a shell, and may be a file's name.
        _ => path.to_owned(),
    }
}

fn in_argument(argument: OsString, home: Option<&str>) -> OsString {
    // What is no text is passed on as it is.
    let Some(text) = argument.to_str().filter(|text| text.contains('~')) else { return argument };
    // The path is all of it, or what follows an option's or a key's name, or the kind of a data set.
    let at = text.find('~').unwrap_or_default();
    match text[..at].ends_with(['=', ':']) || at == 0 {
        true => format!("{}{}", &text[..at], within(&text[at..], home)).into(),
        false => argument,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_home_folder_is_found_where_a_path_begins() {
        for (given, expected) in [
            ("~", "/home/me"),
            ("~/runs/x", "/home/me/runs/x"),
            ("data.path=~/pictures", "data.path=/home/me/pictures"),
            ("--out=~/film.gif", "--out=/home/me/film.gif"),
            ("folder:~/pictures", "folder:/home/me/pictures"),
            ("--data=folder:~/pictures", "--data=folder:/home/me/pictures"),
            ("~you/x", "~you/x"),
            ("a~b", "a~b"),
            ("data.exclude=a/~b.png", "data.exclude=a/~b.png"),
        ] {
            assert_eq!(in_argument(given.into(), Some("/home/me/")), OsString::from(expected));
            assert_eq!(in_argument(given.into(), None), OsString::from(given));
        }
    }
}
