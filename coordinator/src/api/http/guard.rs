//! Access control of the dashboard.
//!
//! 1. Open on a loopback address: every user of this machine may look. A request must then name
//!    this machine as its host, so that a page elsewhere cannot have a browser here read the
//!    dashboard under a name of its own (DNS rebinding).
//! 2. Guarded, where TLS or a join token is configured: requests carry the token in the file
//!    [`TOKEN_FILE`], as `Authorization: Bearer`, as `?token=`, or in the cookie that the latter
//!    sets. Probes need none.
//! 3. Tokens are compared by their hashes, so that the time of the comparison reveals nothing.

use std::io;
use std::net::SocketAddr;

use axum::http::{HeaderMap, HeaderValue, Uri, header};

use crate::run_dir::{RunDir, RunDirError};
use crate::workers::new_token;

/// File in the run directory that holds the token.
pub(crate) const TOKEN_FILE: &str = "http-token";

/// Access rules of one dashboard. See the module documentation.
#[derive(Debug)]
pub(crate) struct Guard {
    token: Option<blake3::Hash>,
    /// Name of the cookie. A host's cookies are shared by all its ports, so each run has its own.
    cookie: String,
    /// Whether the cookie may be sent over TLS only.
    is_secure: bool,
    /// Whether requests must name this machine as their host.
    is_local: bool,
}

/// Verdict on a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// The request is answered.
    Granted,
    /// The request is answered, and the client gets this cookie for later ones.
    GrantedWith(HeaderValue),
    /// The request names another host.
    WrongHost,
    /// The request has no token, or a wrong one.
    NoToken,
}

impl Guard {
    /// Open rules; `address` decides whether requests must name this machine.
    pub(crate) fn open(address: SocketAddr) -> Guard {
        Guard {
            token: None,
            cookie: String::new(),
            is_secure: false,
            is_local: super::is_local(address.ip()),
        }
    }

    /// Rules that require the token.
    pub(crate) fn with_token(token: &str, run: &str, is_secure: bool) -> Guard {
        let cookie = format!("ganglion-{}", run.get(..8).unwrap_or(run));
        Guard { token: Some(blake3::hash(token.as_bytes())), cookie, is_secure, is_local: false }
    }

    /// Whether the dashboard is served over TLS.
    pub(crate) fn is_secure(&self) -> bool {
        self.is_secure
    }

    /// Checks a request. `is_probe` marks paths that reveal nothing about the run.
    pub(crate) fn authorise(&self, uri: &Uri, headers: &HeaderMap, is_probe: bool) -> Admission {
        // Orchestrators probe without secrets, and a probe's answer tells nothing of the run.
        if is_probe {
            return Admission::Granted;
        }
        // DNS rebinding: a page elsewhere makes its own name mean this machine; a browser then still
        // sends that name.
        if self.is_local && !names_this_machine(headers) {
            return Admission::WrongHost;
        }
        let Some(token) = &self.token else { return Admission::Granted };
        // Hashes are compared in constant time, whatever was given.
        let is_right = |given: &str| blake3::hash(given.as_bytes()) == *token;
        let text = |name| headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
        let bearer = text(header::AUTHORIZATION).find_map(|value| value.strip_prefix("Bearer "));
        let mut cookies = text(header::COOKIE).flat_map(|value| value.split(';'));
        let shown = cookies.find_map(|cookie| cookie.trim().strip_prefix(&self.cookie)?.strip_prefix('='));
        if bearer.is_some_and(is_right) || shown.is_some_and(is_right) {
            return Admission::Granted;
        }
        // Last, for a link that a user opens: the cookie takes over, so that the token does not stay in
        // each address.
        match super::pages::parameter(uri, "token").filter(|given| is_right(given)) {
            Some(given) => self.cookie_of(given).map_or(Admission::Granted, Admission::GrantedWith),
            None => Admission::NoToken,
        }
    }

    fn cookie_of(&self, token: &str) -> Option<HeaderValue> {
        let secure = if self.is_secure { "; Secure" } else { "" };
        // No script can read it, and no other site can have it sent.
        let cookie = format!("{}={token}; Path=/; HttpOnly; SameSite=Strict{secure}", self.cookie);
        HeaderValue::from_str(&cookie).ok()
    }
}

fn names_this_machine(headers: &HeaderMap) -> bool {
    let Some(Ok(host)) = headers.get(header::HOST).map(HeaderValue::to_str) else { return false };
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next(),
        None => host.split(':').next(),
    };
    let name = name.unwrap_or_default();
    let is_loopback = || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
    name.eq_ignore_ascii_case("localhost") || is_loopback()
}

/// Returns the run's token. The token of the last start is kept, so that a browser need not ask
/// again; a new one is made if there is none or if others could have read it. It is stored in
/// [`TOKEN_FILE`], which only this user can read.
pub(crate) fn keep_token(run_dir: &RunDir) -> Result<String, RunDirError> {
    let known = run_dir.read_secret(TOKEN_FILE).unwrap_or_default();
    let is_one = known.len() == 32 && known.bytes().all(|byte| byte.is_ascii_hexdigit());
    let fresh =
        || new_token().map_err(|error: io::Error| RunDirError::Input(format!("{TOKEN_FILE}: {error}")));
    let token = if is_one { known } else { fresh()? };
    run_dir.write_secret(TOKEN_FILE, &token)?;
    Ok(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(header::HeaderName, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect()
    }

    fn asks(guard: &Guard, uri: &str, pairs: &[(header::HeaderName, &str)]) -> Admission {
        guard.authorise(&uri.parse().unwrap(), &headers(pairs), false)
    }

    /// Rule 1.
    #[test]
    fn a_loopback_address_is_asked_by_its_own_names() {
        let guard = Guard::open(([127, 0, 0, 1], 7001).into());
        for own in ["localhost", "LOCALHOST:7001", "127.0.0.1:7001", "127.8.9.1", "[::1]:7001", "[::1]"] {
            assert_eq!(asks(&guard, "/", &[(header::HOST, own)]), Admission::Granted, "{own}");
        }
        for other in
            ["evil.example", "localhost.evil.example", "10.0.0.1:7001", "", "[::2]", "127.0.0.1.evil.example"]
        {
            assert_eq!(asks(&guard, "/", &[(header::HOST, other)]), Admission::WrongHost, "{other}");
        }
        assert_eq!(asks(&guard, "/", &[]), Admission::WrongHost);
        let reachable = Guard::open(([10, 0, 0, 1], 7001).into());
        assert_eq!(asks(&reachable, "/", &[(header::HOST, "train.example")]), Admission::Granted);
        assert_eq!(guard.authorise(&"/healthz".parse().unwrap(), &headers(&[]), true), Admission::Granted);
    }

    /// Rule 2.
    #[test]
    fn a_guarded_site_wants_its_token() {
        let guard = Guard::with_token("secret", "0123456789", false);
        let refused = |uri: &str, pairs: &[(header::HeaderName, &str)]| {
            assert_eq!(asks(&guard, uri, pairs), Admission::NoToken, "{uri} {pairs:?}");
        };
        refused("/", &[]);
        refused("/?token=", &[]);
        refused("/?token=Secret", &[]);
        refused("/?xtoken=secret", &[]);
        refused("/", &[(header::AUTHORIZATION, "secret")]);
        refused("/", &[(header::AUTHORIZATION, "Bearer secret2")]);
        refused("/", &[(header::COOKIE, "ganglion-0123456=secret")]);
        refused("/", &[(header::COOKIE, "ganglion-01234567=other")]);
        assert_eq!(asks(&guard, "/", &[(header::AUTHORIZATION, "Bearer secret")]), Admission::Granted);
        let cookie = [(header::COOKIE, "a=b; ganglion-01234567=secret; c=d")];
        assert_eq!(asks(&guard, "/", &cookie), Admission::Granted);
        let Admission::GrantedWith(set) = asks(&guard, "/?from=1&token=secret", &[]) else {
            panic!("no cookie")
        };
        assert_eq!(set, "ganglion-01234567=secret; Path=/; HttpOnly; SameSite=Strict");
        let over_tls = Guard::with_token("secret", "r", true);
        let Admission::GrantedWith(set) = asks(&over_tls, "/?token=secret", &[]) else { panic!("no cookie") };
        assert!(set.to_str().unwrap().ends_with("; Secure"), "{set:?}");
    }

    #[test]
    fn a_token_is_kept_and_only_this_user_reads_it() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let run_dir = RunDir::hold(&dir.path().join("run")).unwrap();
        let token = keep_token(&run_dir).unwrap();
        assert_eq!(token.len(), 32);
        assert_eq!(keep_token(&run_dir).unwrap(), token);
        let file = run_dir.path(TOKEN_FILE);
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert_ne!(keep_token(&run_dir).unwrap(), token, "others could read it");
        std::fs::write(&file, "mine").unwrap();
        assert_ne!(keep_token(&run_dir).unwrap(), "mine");
    }
}
