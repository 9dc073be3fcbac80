//! Addresses to listen on, as users give them.

use std::net::{SocketAddr, ToSocketAddrs};

/// Option that gives an address.
#[derive(Debug, PartialEq, Eq)]
pub struct Listener {
    /// Name of the option.
    pub option: &'static str,
    /// Valid values, for error texts.
    pub choice: &'static str,
    /// Ways out where others reach the address and nothing is encrypted.
    pub advice: &'static str,
}

/// Error: an address cannot be listened on.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ListenError {
    /// The text is no address of this machine.
    #[error("{} {text}: {reason}; give {}", listener.option, listener.choice)]
    Wrong {
        /// The option.
        listener: &'static Listener,
        /// The value that was refused.
        text: String,
        /// Finding of the system.
        reason: String,
    },
    /// Other machines reach the address, and nothing is encrypted.
    #[error(
        "{} {text}: other machines reach this address and the connection is not encrypted; {}",
        listener.option, listener.advice
    )]
    Open {
        /// The option.
        listener: &'static Listener,
        /// The value that was refused.
        text: String,
    },
}

impl Listener {
    /// Parses a value of the option. `may_be_open` says whether other machines may reach the address.
    ///
    /// # Errors
    /// See [`ListenError`].
    pub fn parse(&'static self, text: &str, may_be_open: bool) -> Result<SocketAddr, ListenError> {
        let wrong = |reason| ListenError::Wrong { listener: self, text: text.to_string(), reason };
        let mut addresses = text.to_socket_addrs().map_err(|error| wrong(error.to_string()))?;
        let address = addresses.next().ok_or_else(|| wrong("no such address".to_string()))?;
        // Default deny: without TLS and without consent nobody else may reach a listener.
        match address.ip().is_loopback() || may_be_open {
            true => Ok(address),
            false => Err(ListenError::Open { listener: self, text: text.to_string() }),
        }
    }
}

/// Loopback address with the port of the last start, or any free one.
pub(crate) fn loopback(last_port: Option<u16>) -> SocketAddr {
    ([127, 0, 0, 1], last_port.unwrap_or(0)).into()
}
