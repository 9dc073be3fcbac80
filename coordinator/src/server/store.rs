//! The store in which the members of a group find each other.
//!
//! 1. Only keys of this term and of the newest generation are served; older ones are gone and never come back.
//! 2. It holds a bounded number of keys of bounded size.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ganglion_membership::{Generation, Term};
use ganglion_proto::wire::store_service_server::StoreService;
use ganglion_proto::wire::{
    AddRequest, AddResponse, CompareSetRequest, CompareSetResponse, ContainsRequest, ContainsResponse,
    DeleteRequest, DeleteResponse, GetRequest, GetResponse, Key, SetRequest, SetResponse,
};
use tokio::sync::watch;
use tonic::{Request, Response, Status};

/// Keys of one generation. A group of n needs about n^2.
const KEY_LIMIT: usize = 1 << 20;
/// Bytes of a key's name and value together.
const ENTRY_LIMIT: usize = 64 << 10;
/// Bytes of all keys of a generation.
const STORE_LIMIT: usize = 256 << 20;
/// The longest wait for a key.
const WAIT_LIMIT: Duration = Duration::from_secs(600);

/// A handle to the store.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
}

struct Shared {
    term: Term,
    entries: Mutex<Entries>,
    /// Counts changes, for those that wait for a key.
    changes: watch::Sender<u64>,
}

#[derive(Default)]
struct Entries {
    generation: Generation,
    values: BTreeMap<String, Vec<u8>>,
    /// Bytes of all names and values.
    bytes: usize,
}

impl Entries {
    fn put(&mut self, name: String, value: Vec<u8>) -> Result<(), Status> {
        let size = name.len() + value.len();
        let replaced = self.values.get(&name).map_or(0, |old| name.len() + old.len());
        let bytes = self.bytes - replaced + size;
        if size > ENTRY_LIMIT || bytes > STORE_LIMIT || self.values.len() >= KEY_LIMIT {
            return Err(Status::resource_exhausted("the store is full or the entry too large"));
        }
        self.values.insert(name, value);
        self.bytes = bytes;
        Ok(())
    }

    fn remove(&mut self, name: &str) -> bool {
        let removed = self.values.remove(name);
        self.bytes -= removed.as_ref().map_or(0, |value| name.len() + value.len());
        removed.is_some()
    }
}

impl Store {
    /// An empty store for a term.
    pub fn new(term: Term) -> Store {
        let (changes, _) = watch::channel(0);
        Store { shared: Arc::new(Shared { term, entries: Mutex::default(), changes }) }
    }

    /// Drops all keys and serves a new generation from now on.
    pub fn begin(&self, generation: Generation) {
        *self.entries() = Entries { generation, ..Entries::default() };
        self.changed();
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.shared.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.shared.changes.send_modify(|count| *count += 1);
    }

    /// A key's name, if its generation is the one that is served.
    fn open(&self, entries: &Entries, key: Option<Key>) -> Result<String, Status> {
        let key = key.ok_or_else(|| Status::invalid_argument("key is missing"))?;
        if key.term != self.shared.term.0 || key.generation != entries.generation.0 {
            let newest = entries.generation;
            let what = format!(
                "term {} generation {} is over; this is term {} generation {newest}",
                key.term, key.generation, self.shared.term
            );
            return Err(Status::failed_precondition(what));
        }
        Ok(key.name)
    }

    fn put(&self, entries: &mut Entries, name: String, value: Vec<u8>) -> Result<(), Status> {
        entries.put(name, value)?;
        self.changed();
        Ok(())
    }
}

fn counter(value: Option<&Vec<u8>>) -> Result<i64, Status> {
    let Some(value) = value else { return Ok(0) };
    let number = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
    number.ok_or_else(|| Status::failed_precondition("the key holds no counter"))
}

#[tonic::async_trait]
impl StoreService for Store {
    async fn set(&self, request: Request<SetRequest>) -> Result<Response<SetResponse>, Status> {
        let request = request.into_inner();
        let mut entries = self.entries();
        let name = self.open(&entries, request.key)?;
        self.put(&mut entries, name, request.value)?;
        Ok(Response::new(SetResponse {}))
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let request = request.into_inner();
        let limit = Duration::from_millis(request.timeout_ms).min(WAIT_LIMIT);
        let mut changes = self.shared.changes.subscribe();
        let deadline = tokio::time::Instant::now() + limit;
        loop {
            changes.mark_unchanged();
            {
                let entries = self.entries();
                let name = self.open(&entries, request.key.clone())?;
                if let Some(value) = entries.values.get(&name) {
                    return Ok(Response::new(GetResponse { value: value.clone() }));
                }
            }
            match tokio::time::timeout_at(deadline, changes.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(Status::unavailable("the coordinator is stopping")),
                Err(_) => return Err(Status::deadline_exceeded("the key was not set in time")),
            }
        }
    }

    async fn add(&self, request: Request<AddRequest>) -> Result<Response<AddResponse>, Status> {
        let request = request.into_inner();
        let mut entries = self.entries();
        let name = self.open(&entries, request.key)?;
        let value = counter(entries.values.get(&name))?
            .checked_add(request.delta)
            .ok_or_else(|| Status::out_of_range("the counter is full"))?;
        self.put(&mut entries, name, value.to_string().into_bytes())?;
        Ok(Response::new(AddResponse { value }))
    }

    async fn compare_set(
        &self,
        request: Request<CompareSetRequest>,
    ) -> Result<Response<CompareSetResponse>, Status> {
        let request = request.into_inner();
        let mut entries = self.entries();
        let name = self.open(&entries, request.key)?;
        let value = match entries.values.get(&name) {
            Some(value) if *value != request.expected => value.clone(),
            None if !request.expected.is_empty() => request.expected,
            _ => {
                self.put(&mut entries, name, request.desired.clone())?;
                request.desired
            }
        };
        Ok(Response::new(CompareSetResponse { value }))
    }

    async fn delete(&self, request: Request<DeleteRequest>) -> Result<Response<DeleteResponse>, Status> {
        let mut entries = self.entries();
        let name = self.open(&entries, request.into_inner().key)?;
        let existed = entries.remove(&name);
        Ok(Response::new(DeleteResponse { existed }))
    }

    async fn contains(
        &self,
        request: Request<ContainsRequest>,
    ) -> Result<Response<ContainsResponse>, Status> {
        let entries = self.entries();
        let mut all = true;
        for key in request.into_inner().keys {
            let name = self.open(&entries, Some(key))?;
            all &= entries.values.contains_key(&name);
        }
        Ok(Response::new(ContainsResponse { all }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(generation: u64, name: &str) -> Option<Key> {
        Some(Key { term: 1, generation, name: name.to_string() })
    }

    fn store() -> Store {
        let store = Store::new(Term(1));
        store.begin(Generation(2));
        store
    }

    #[tokio::test]
    async fn a_get_waits_for_its_key_and_for_no_longer_than_it_may() {
        let store = store();
        let waiting = store.clone();
        let get = |timeout_ms| Request::new(GetRequest { key: key(2, "k"), timeout_ms });
        let early = store.get(get(1)).await.unwrap_err();
        assert_eq!(early.code(), tonic::Code::DeadlineExceeded);
        let waiter = tokio::spawn(async move { waiting.get(get(60_000)).await });
        let set = SetRequest { key: key(2, "k"), value: vec![7] };
        store.set(Request::new(set)).await.unwrap();
        assert_eq!(waiter.await.unwrap().unwrap().into_inner().value, [7]);
    }

    #[tokio::test]
    async fn an_older_generation_is_refused_and_its_waiters_are_freed() {
        let store = store();
        let waiting = store.clone();
        let get = GetRequest { key: key(2, "k"), timeout_ms: 60_000 };
        let waiter = tokio::spawn(async move { waiting.get(Request::new(get)).await });
        tokio::task::yield_now().await;
        store.begin(Generation(3));
        assert_eq!(waiter.await.unwrap().unwrap_err().code(), tonic::Code::FailedPrecondition);
        let set = SetRequest { key: key(2, "k"), value: vec![] };
        assert!(store.set(Request::new(set)).await.is_err());
    }

    #[test]
    fn what_all_keys_hold_is_bounded() {
        let mut entries = Entries { bytes: STORE_LIMIT - 20, ..Entries::default() };
        entries.put("a".to_string(), vec![0; 9]).unwrap();
        entries.put("a".to_string(), vec![0; 19]).unwrap();
        assert!(entries.put("b".to_string(), vec![]).is_err());
        assert!(entries.remove("a") && !entries.remove("a"));
        entries.put("b".to_string(), vec![0; 19]).unwrap();
    }

    #[tokio::test]
    async fn counters_add_and_compare_set_compares() {
        let store = store();
        for (delta, value) in [(2, 2), (-5, -3)] {
            let add = AddRequest { key: key(2, "n"), delta };
            assert_eq!(store.add(Request::new(add)).await.unwrap().into_inner().value, value);
        }
        let swap = |expected: &[u8], desired: &[u8]| {
            Request::new(CompareSetRequest {
                key: key(2, "s"),
                expected: expected.to_vec(),
                desired: desired.to_vec(),
            })
        };
        assert_eq!(store.compare_set(swap(b"x", b"y")).await.unwrap().into_inner().value, b"x");
        assert_eq!(store.compare_set(swap(b"", b"y")).await.unwrap().into_inner().value, b"y");
        assert_eq!(store.compare_set(swap(b"x", b"z")).await.unwrap().into_inner().value, b"y");
        assert_eq!(store.compare_set(swap(b"y", b"z")).await.unwrap().into_inner().value, b"z");
    }
}
