//! The mistakes that `tests/planted/check.py` plants still fit the protocol.

use std::path::Path;

/// Text that a patch expects, by file, and the text it puts there.
fn hunks(patch: &str) -> Vec<(String, String, String)> {
    let (mut hunks, mut file) = (Vec::<(String, String, String)>::new(), String::new());
    for line in patch.lines() {
        if let Some(name) = line.strip_prefix("--- ") {
            file = name.to_string();
        } else if line.starts_with("@@") {
            hunks.push((file.clone(), String::new(), String::new()));
        } else if let Some((_, before, after)) = hunks.last_mut()
            && let Some((kind, text)) = line.split_at_checked(1)
        {
            if kind != "+" {
                before.push_str(&format!("{text}\n"));
            }
            if kind != "-" {
                after.push_str(&format!("{text}\n"));
            }
        }
    }
    hunks
}

#[test]
fn every_planted_mistake_still_fits_the_machine() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let patches = std::fs::read_dir(root.join("tests/planted")).expect("the folder is there");
    let mut count = 0;
    for path in patches.map(|entry| entry.expect("it can be read").path()) {
        if path.extension().is_none_or(|ending| ending != "patch") {
            continue;
        }
        let hunks = hunks(&std::fs::read_to_string(&path).expect("a patch is text"));
        assert!(!hunks.is_empty(), "{} changes nothing", path.display());
        for (file, before, after) in hunks {
            let name = root.parent().expect("the workspace").join(file);
            let source = std::fs::read_to_string(&name).expect("a patched file is there");
            assert!(source.contains(&before) && before != after, "{} does not fit", path.display());
        }
        count += 1;
    }
    assert!(count >= 9);
}
