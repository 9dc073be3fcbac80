//! Interfaces to the outside: gRPC for workers and operators, HTTP for dashboards and probes.

pub(crate) mod address;
pub mod grpc;
pub(crate) mod http;
pub(crate) mod security;
