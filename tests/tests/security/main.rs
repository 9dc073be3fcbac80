//! Access control, and secrecy of the traffic.
#![allow(clippy::unwrap_used)] // a test may panic

mod guard;
mod hostile;
mod run;
mod secrets;
mod traffic;
mod words;
