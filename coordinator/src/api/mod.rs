//! Interfaces to the outside: gRPC for workers and operators, HTTP for dashboards and probes.

pub mod address;
pub mod grpc;
pub mod http;
pub mod security;
