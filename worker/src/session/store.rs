//! Client of the coordinator's key-value store, in which a group's members find each other.

use std::time::{Duration, Instant};

use c10d::{KeyValueStore, StoreError};
use ganglion_membership::{Generation, Term};
use ganglion_proto::credentials::JoinToken;
use ganglion_proto::wire::store_service_client::StoreServiceClient;
use ganglion_proto::wire::{
    AddRequest, CompareSetRequest, ContainsRequest, DeleteRequest, GetManyRequest, GetRequest, Key,
    SetRequest,
};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

/// Limit on the answer to a request that does not wait.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Store of one generation's keys. Its calls block, so they must not come from the session's thread.
pub(super) struct GrpcStore {
    pub(super) client: StoreServiceClient<Channel>,
    pub(super) runtime: Handle,
    pub(super) token: Option<JoinToken>,
    pub(super) term: Term,
    pub(super) generation: Generation,
    /// Newest generation that the worker was told to leave.
    pub(super) aborted: watch::Receiver<Generation>,
}

impl GrpcStore {
    fn key(&self, name: &str) -> Key {
        Key { term: self.term.0, generation: self.generation.0, name: name.to_string() }
    }

    fn ask<M, R, F>(
        &self,
        message: M,
        limit: Duration,
        call: impl FnOnce(StoreServiceClient<Channel>, Request<M>) -> F,
    ) -> Result<R, StoreError>
    where
        F: Future<Output = Result<tonic::Response<R>, Status>>,
    {
        let mut request = Request::new(message);
        request.set_timeout(limit);
        if let Some(token) = &self.token {
            token.authorise(&mut request);
        }
        let mut aborted = self.aborted.clone();
        // Bounded by `limit`; an abort of the generation ends the wait at once.
        let answer = self.runtime.block_on(async {
            tokio::select! {
                answer = tokio::time::timeout(limit, call(self.client.clone(), request)) => Some(answer),
                _ = aborted.wait_for(|newest| *newest >= self.generation) => None,
            }
        });
        let Some(answer) = answer else { return Err(StoreError::Aborted) };
        match answer {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) if status.code() == Code::DeadlineExceeded => Err(StoreError::Timeout),
            Ok(Err(status)) => Err(StoreError::Unreachable(status.message().to_string())),
            Err(_) => Err(StoreError::Timeout),
        }
    }
}

impl KeyValueStore for GrpcStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        let message = SetRequest { key: Some(self.key(key)), value: value.to_vec() };
        self.ask(message, ANSWER_LIMIT, |mut client, request| async move { client.set(request).await })?;
        Ok(())
    }

    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>, StoreError> {
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        let message = GetRequest { key: Some(self.key(key)), timeout_ms };
        let limit = timeout.saturating_add(ANSWER_LIMIT);
        let answer =
            self.ask(message, limit, |mut client, request| async move { client.get(request).await })?;
        Ok(answer.value)
    }

    fn get_many(&self, keys: &[&str], timeout: Duration) -> Result<Vec<Vec<u8>>, StoreError> {
        let until = Instant::now() + timeout;
        let mut values = Vec::with_capacity(keys.len());
        while values.len() < keys.len() {
            let left = until.saturating_duration_since(Instant::now());
            let timeout_ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
            let keys = keys[values.len()..].iter().map(|name| self.key(name)).collect();
            let message = GetManyRequest { keys, timeout_ms };
            let limit = left.saturating_add(ANSWER_LIMIT);
            let answer = self
                .ask(message, limit, |mut client, request| async move { client.get_many(request).await })?;
            if answer.values.is_empty() {
                return Err(StoreError::Fatal("the store answers without a value".to_string()));
            }
            values.extend(answer.values);
        }
        values.truncate(keys.len());
        Ok(values)
    }

    fn add(&self, key: &str, amount: i64) -> Result<i64, StoreError> {
        let message = AddRequest { key: Some(self.key(key)), delta: amount };
        let answer =
            self.ask(message, ANSWER_LIMIT, |mut client, request| async move { client.add(request).await })?;
        Ok(answer.value)
    }

    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>, StoreError> {
        let message = CompareSetRequest {
            key: Some(self.key(key)),
            expected: expected.to_vec(),
            desired: desired.to_vec(),
        };
        let answer = self.ask(message, ANSWER_LIMIT, |mut client, request| async move {
            client.compare_set(request).await
        })?;
        Ok(answer.value)
    }

    fn delete(&self, key: &str) -> Result<bool, StoreError> {
        let message = DeleteRequest { key: Some(self.key(key)) };
        let answer = self
            .ask(message, ANSWER_LIMIT, |mut client, request| async move { client.delete(request).await })?;
        Ok(answer.existed)
    }

    fn contains(&self, keys: &[&str]) -> Result<bool, StoreError> {
        let message = ContainsRequest { keys: keys.iter().map(|name| self.key(name)).collect() };
        let answer =
            self.ask(
                message,
                ANSWER_LIMIT,
                |mut client, request| async move { client.contains(request).await },
            )?;
        Ok(answer.all)
    }
}
