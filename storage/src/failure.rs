//! Classification of storage errors, and their wording for users.

use std::error::Error as _;
use std::io;

use object_store::Error;
use rustix::io::Errno;

use crate::whole;

/// Longest error text, in characters; a longer one is a page of the server's, and cut.
const LONGEST: usize = 300;
/// Hosts at which a library asks for credentials when the environment has none.
const METADATA: [&str; 3] = ["169.254.169.254", "169.254.170.2", "metadata.google.internal"];

/// Returns an error in one line: the message of the system or the server, without its surroundings.
pub fn reason(error: &Error) -> String {
    let whole = error.to_string();
    if asks_the_machine(&whole) {
        return "no credentials: the environment has none, and the machine gives none".to_string();
    }
    // An answer of S3 or Azure: its own code and message say more than the library's words around it.
    if let (Some(code), Some(message)) = (element(&whole, "Code"), element(&whole, "Message")) {
        return format!("{} ({code})", message.trim_end_matches('.'));
    }
    let mut cause: &dyn std::error::Error = error;
    // The innermost cause is the system's or the server's.
    while let Some(source) = cause.source() {
        cause = source;
    }
    // In one line: it becomes a field of the log and of an event.
    let line: Vec<String> = cause.to_string().split_whitespace().map(str::to_string).collect();
    line.join(" ").chars().take(LONGEST).collect()
}

/// Whether the same request may succeed later: the server or the way to it is at fault, not the
/// request.
pub(crate) fn may_pass(error: &Error) -> bool {
    // The library gives the other variants a meaning of their own: not found, denied, and so on.
    let Error::Generic { .. } = error else { return matches!(error, Error::JoinError { .. }) };
    let text = error.to_string();
    // Too slow, or too many requests: the only answers of the 400s that pass.
    let busy = text.contains("status code: 408") || text.contains("status code: 429");
    // The library exposes the status only as text.
    let refused = text.contains("status code: 4") || text.contains("redirect without LOCATION");
    (busy || !refused) && !asks_the_machine(&text) && error.source().is_some()
}

/// Whether an error of a folder says nothing about its files: the network or the file server is
/// away, or this machine is short of a resource.
pub(crate) fn is_passing(error: &Error) -> bool {
    const PASSING: [Errno; 14] = [
        Errno::AGAIN,
        Errno::BUSY,
        Errno::HOSTDOWN,
        Errno::HOSTUNREACH,
        Errno::INTR,
        Errno::MFILE,
        Errno::NETDOWN,
        Errno::NETUNREACH,
        Errno::NFILE,
        Errno::NOMEM,
        Errno::NOTCONN,
        Errno::SHUTDOWN,
        Errno::STALE,
        Errno::TIMEDOUT,
    ];
    // The library wraps the system's error once or twice.
    let errno = system_error(error).and_then(Errno::from_io_error);
    errno.is_some_and(|errno| PASSING.contains(&errno))
}

/// Whether an error of a folder means that it is full or failing, and not that it is the wrong one.
pub(crate) fn is_failing(error: &Error) -> bool {
    system_error(error).is_some_and(|error| !whole::is_mistake(error))
}

/// Whether an error of a folder means that something does not exist, exists already, or may not be
/// touched.
pub(crate) fn is_final(error: &Error) -> bool {
    use io::ErrorKind::{AlreadyExists, NotFound, PermissionDenied};
    let kinds = [AlreadyExists, NotFound, PermissionDenied];
    system_error(error).is_some_and(|error| kinds.contains(&error.kind()))
        || matches!(error, Error::NotFound { .. } | Error::AlreadyExists { .. })
}

/// Returns the system's error, without its context.
fn system_error(error: &Error) -> Option<&io::Error> {
    let first: Option<&(dyn std::error::Error + 'static)> = Some(error);
    let mut causes = std::iter::successors(first, |cause| (*cause).source());
    causes.find_map(|cause| cause.downcast_ref::<io::Error>())
}

fn asks_the_machine(text: &str) -> bool {
    METADATA.iter().any(|host| text.contains(host))
}

/// Returns the content of an XML element in an answer.
fn element<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, behind) = text.split_once(&format!("<{name}>"))?;
    Some(behind.split_once(&format!("</{name}>"))?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(text: &str) -> Error {
        Error::Generic { store: "S3", source: text.into() }
    }

    #[test]
    fn the_server_and_the_way_to_it_may_come_back_and_a_mistake_stays() {
        let status = |code: &str| format!("Server returned non-2xx status code: {code}: x");
        for (text, passes) in [
            (status("503 Service Unavailable"), true),
            (status("429 Too Many Requests"), true),
            (status("400 Bad Request"), false),
            ("tcp connect error: Connection refused".to_string(), true),
            ("Error performing PUT http://169.254.169.254/latest/api/token in 1s".to_string(), false),
        ] {
            assert_eq!(may_pass(&generic(&text)), passes, "{text}");
        }
        let missing = Error::NotFound { path: "a".into(), source: "x".into() };
        assert!(!may_pass(&missing));
    }

    #[test]
    fn a_folder_that_is_away_is_told_from_a_file_that_cannot_be_read() {
        let failed = |errno: Errno| Error::Generic { store: "folder", source: io::Error::from(errno).into() };
        assert!(
            [Errno::STALE, Errno::NOTCONN, Errno::MFILE].into_iter().all(|away| is_passing(&failed(away)))
        );
        assert!(![Errno::IO, Errno::ACCESS, Errno::NOSPC].into_iter().any(|here| is_passing(&failed(here))));
        assert!([Errno::IO, Errno::DQUOT, Errno::NOSPC].into_iter().all(|full| is_failing(&failed(full))));
        assert!(![Errno::ACCESS, Errno::NOTDIR].into_iter().any(|wrong| is_failing(&failed(wrong))));
        assert!(is_final(&failed(Errno::ACCESS)) && !is_final(&failed(Errno::ROFS)));
    }

    #[test]
    fn a_reason_is_what_the_server_says() {
        let page = "Server returned non-2xx status code: 403 Forbidden: <?xml version=\"1.0\"?>\n<Error><Code>SignatureDoesNotMatch\
                    </Code><Message>The signature does not match.</Message><StringToSign>hush</StringToSign></Error>";
        assert_eq!(reason(&generic(page)), "The signature does not match (SignatureDoesNotMatch)");
        assert_eq!(reason(&generic("a\n  b")), "a b");
        assert!(reason(&generic("PUT http://169.254.169.254/latest")).starts_with("no credentials"));
    }
}
