//! Who may connect, and what others can read on the way.
#![allow(clippy::unwrap_used)] // a test may panic

mod guard;
mod hostile;
mod run;
mod secrets;
mod traffic;
mod words;
