//! Key-value store through which the members of a group find each other.
//!
//! 1. Only keys of this term and of the newest generation are served; older ones are gone and never
//!    come back.
//! 2. The store holds a bounded number of keys of bounded size.
//! 3. A change of a key wakes only the waiters of this key: members of a group of n wait for n^2 keys.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ganglion_membership::{Generation, Term};
use ganglion_proto::wire::store_service_server::StoreService;
use ganglion_proto::wire::{
    AddRequest, AddResponse, CompareSetRequest, CompareSetResponse, ContainsRequest, ContainsResponse,
    DeleteRequest, DeleteResponse, GetManyRequest, GetManyResponse, GetRequest, GetResponse, Key, SetRequest,
    SetResponse,
};
use tokio::sync::Notify;
use tonic::{Request, Response, Status};

/// Maximum number of keys of a generation. A group of n needs about n^2.
// A thousand members, squared.
const KEY_LIMIT: usize = 1 << 20;
/// Maximum size of a key's name and value together, in bytes.
const ENTRY_LIMIT: usize = 64 << 10;
/// Maximum size of all keys of a generation, in bytes.
const STORE_LIMIT: usize = 256 << 20;
/// Maximum length of a key's name, in bytes.
const NAME_LIMIT: usize = 1024;
/// Size of the values in one answer from which on no more are added, in bytes.
const ANSWER_SIZE: usize = 1 << 20;
/// Maximum number of keys in one request.
const ASKED_LIMIT: usize = 1 << 16;
/// Maximum wait for a key.
// The client says how long it waits; this bounds one that says too much.
const WAIT_LIMIT: Duration = Duration::from_secs(600);

/// Shared handle of the store.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
}

struct Shared {
    term: Term,
    entries: Mutex<Entries>,
    /// Number of times that waiters were woken.
    #[cfg(test)]
    wakeups: std::sync::atomic::AtomicUsize,
}

#[derive(Default)]
struct Entries {
    generation: Generation,
    values: BTreeMap<String, Vec<u8>>,
    /// Size of all names and values, in bytes.
    bytes: usize,
    /// Waiters by the name of their key.
    waiting: BTreeMap<String, Arc<Notify>>,
}

/// A request that waits for a key.
struct Waiter<'a> {
    store: &'a Store,
    name: String,
    notify: Arc<Notify>,
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        let mut entries = self.store.entries();
        // The last waiter sees two owners of the `Arc`: the map and itself.
        let is_last = entries
            .waiting
            .get(&self.name)
            .is_some_and(|known| Arc::ptr_eq(known, &self.notify) && Arc::strong_count(known) == 2);
        if is_last {
            entries.waiting.remove(&self.name);
        }
    }
}

impl Entries {
    fn put(&mut self, name: String, value: Vec<u8>) -> Result<(), Status> {
        let size = name.len() + value.len();
        let replaced = self.values.get(&name).map(|old| name.len() + old.len());
        let bytes = self.bytes - replaced.unwrap_or(0) + size;
        // A key that is there takes no further place: counters still count in a full store.
        let is_full = replaced.is_none() && self.values.len() >= KEY_LIMIT;
        if size > ENTRY_LIMIT || bytes > STORE_LIMIT || is_full {
            return Err(Status::resource_exhausted("the store is full or the entry too large"));
        }
        // Under the lock: a woken waiter looks again only when the value is in.
        if let Some(waiting) = self.waiting.remove(&name) {
            waiting.notify_waiters();
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
    /// Creates an empty store for a term.
    pub fn new(term: Term) -> Store {
        let shared = Shared {
            term,
            entries: Mutex::default(),
            #[cfg(test)]
            wakeups: std::sync::atomic::AtomicUsize::default(),
        };
        Store { shared: Arc::new(shared) }
    }

    /// Drops all keys and serves a new generation from now on.
    pub fn begin(&self, generation: Generation) {
        let before = std::mem::replace(&mut *self.entries(), Entries { generation, ..Entries::default() });
        // Waiters of the old generation look again, and are refused: no member of it waits for a peer
        // that will not come.
        before.waiting.values().for_each(|waiting| waiting.notify_waiters());
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        // Never held over an await. Nothing in it panics halfway, so a poisoned lock may be used.
        self.shared.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks a key and returns its name, if its generation is the one that is served.
    fn open(&self, entries: &Entries, key: Option<Key>) -> Result<String, Status> {
        let key = key.ok_or_else(|| Status::invalid_argument("key is missing"))?;
        // M6: a member that was left behind must not meet the members of a newer generation.
        if key.term != self.shared.term.0 || key.generation != entries.generation.0 {
            let newest = entries.generation;
            let what = format!(
                "term {} generation {} is over; this is term {} generation {newest}",
                key.term, key.generation, self.shared.term
            );
            return Err(Status::failed_precondition(what));
        }
        if key.name.len() > NAME_LIMIT {
            return Err(Status::resource_exhausted(format!("a key's name has at most {NAME_LIMIT} bytes")));
        }
        Ok(key.name)
    }

    /// Value of a key, or a waiter for it.
    fn look(&self, key: Option<Key>) -> Result<Result<Vec<u8>, Waiter<'_>>, Status> {
        let mut entries = self.entries();
        let name = self.open(&entries, key)?;
        if let Some(value) = entries.values.get(&name) {
            return Ok(Ok(value.clone()));
        }
        let notify = entries.waiting.entry(name.clone()).or_default().clone();
        Ok(Err(Waiter { store: self, name, notify }))
    }

    /// Waits until a key has a value. The caller limits the time.
    async fn wait(&self, key: Option<Key>) -> Result<Vec<u8>, Status> {
        loop {
            let waiter = match self.look(key.clone())? {
                Ok(value) => return Ok(value),
                Err(waiter) => waiter,
            };
            let mut changed = pin!(waiter.notify.notified());
            // Registers before the second look, so that a change between look and wait is not missed.
            changed.as_mut().enable();
            // The key may have been set, and even removed again, before this waiter was enabled.
            match self.look(key.clone())? {
                Ok(value) => return Ok(value),
                Err(again) if !Arc::ptr_eq(&again.notify, &waiter.notify) => continue,
                Err(_) => {}
            }
            // No lock is held here. `put` wakes it, and so does `begin`, after which `look` refuses
            // the key.
            changed.await;
            #[cfg(test)]
            self.shared.wakeups.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    }
}

/// Checks that a request does not ask for too many keys.
fn check_count(keys: &[Key]) -> Result<(), Status> {
    let too_many =
        || Status::resource_exhausted(format!("at most {ASKED_LIMIT} keys may be asked for at once"));
    if keys.len() > ASKED_LIMIT { Err(too_many()) } else { Ok(()) }
}

fn counter(value: Option<&Vec<u8>>) -> Result<i64, Status> {
    let Some(value) = value else { return Ok(0) };
    // As text, like in libtorch's TCPStore: `get` must read a counter as well.
    let number = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
    number.ok_or_else(|| Status::failed_precondition("the key holds no counter"))
}

#[tonic::async_trait]
impl StoreService for Store {
    async fn set(&self, request: Request<SetRequest>) -> Result<Response<SetResponse>, Status> {
        let request = request.into_inner();
        let mut entries = self.entries();
        let name = self.open(&entries, request.key)?;
        entries.put(name, request.value)?;
        Ok(Response::new(SetResponse {}))
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let request = request.into_inner();
        let limit = Duration::from_millis(request.timeout_ms).min(WAIT_LIMIT);
        // If the client cancels or the limit passes, the waiter is dropped, which removes its entry.
        match tokio::time::timeout(limit, self.wait(request.key)).await {
            Ok(value) => Ok(Response::new(GetResponse { value: value? })),
            Err(_) => Err(Status::deadline_exceeded("the key was not set in time")),
        }
    }

    async fn get_many(&self, request: Request<GetManyRequest>) -> Result<Response<GetManyResponse>, Status> {
        let GetManyRequest { keys, timeout_ms } = request.into_inner();
        check_count(&keys)?;
        let all = async {
            let (mut values, mut size) = (Vec::new(), 0);
            for key in keys {
                if size > ANSWER_SIZE {
                    break;
                }
                let value = self.wait(Some(key)).await?;
                size += value.len();
                values.push(value);
            }
            Ok(Response::new(GetManyResponse { values }))
        };
        let limit = Duration::from_millis(timeout_ms).min(WAIT_LIMIT);
        let late = |_| Err(Status::deadline_exceeded("a key was not set in time"));
        tokio::time::timeout(limit, all).await.unwrap_or_else(late)
    }

    async fn add(&self, request: Request<AddRequest>) -> Result<Response<AddResponse>, Status> {
        let request = request.into_inner();
        let mut entries = self.entries();
        let name = self.open(&entries, request.key)?;
        let value = counter(entries.values.get(&name))?
            .checked_add(request.delta)
            .ok_or_else(|| Status::out_of_range("the counter is full"))?;
        entries.put(name, value.to_string().into_bytes())?;
        Ok(Response::new(AddResponse { value }))
    }

    async fn compare_set(
        &self,
        request: Request<CompareSetRequest>,
    ) -> Result<Response<CompareSetResponse>, Status> {
        let request = request.into_inner();
        let mut entries = self.entries();
        let name = self.open(&entries, request.key)?;
        // The cases of libtorch's TCPStore, which Gloo and NCCL are written for.
        let value = match entries.values.get(&name) {
            Some(value) if *value != request.expected => value.clone(),
            None if !request.expected.is_empty() => request.expected,
            _ => {
                entries.put(name, request.desired.clone())?;
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
        let keys = request.into_inner().keys;
        // The lock is held for all of them.
        check_count(&keys)?;
        for key in keys {
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
    async fn several_keys_are_waited_for_together_and_come_in_their_order() {
        let store = store();
        let get = |names: &[&str], timeout_ms| {
            let keys = names.iter().filter_map(|name| key(2, name)).collect();
            Request::new(GetManyRequest { keys, timeout_ms })
        };
        let set = |name: &str, value| Request::new(SetRequest { key: key(2, name), value });
        store.set(set("b", vec![2])).await.unwrap();
        let early = store.get_many(get(&["b", "a"], 1)).await.unwrap_err();
        assert_eq!(early.code(), tonic::Code::DeadlineExceeded);
        let waiting = store.clone();
        let all = get(&["b", "a", "b"], 60_000);
        let waiter = tokio::spawn(async move { waiting.get_many(all).await });
        store.set(set("a", vec![1])).await.unwrap();
        assert_eq!(waiter.await.unwrap().unwrap().into_inner().values, [[2], [1], [2]]);
        // No more than a message holds; the client asks for the rest.
        for name in ["a", "b"] {
            store.set(set(name, vec![0; ENTRY_LIMIT - NAME_LIMIT])).await.unwrap();
        }
        let many = ["a", "b"].repeat(40);
        let some = store.get_many(get(&many, 60_000)).await.unwrap().into_inner().values.len();
        assert!((1..80).contains(&some), "{some}");
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

    /// Invariant 3, by the number of wakeups: it equals the number of waiters, and not its product
    /// with the number of changes.
    #[tokio::test]
    async fn a_change_wakes_those_that_wait_for_it_and_nobody_else() {
        const MEMBERS: u64 = 60;
        let store = store();
        let names: Vec<String> = (0..MEMBERS).map(|member| format!("member {member}")).collect();
        let mut waiting = tokio::task::JoinSet::new();
        for name in names.iter().flat_map(|name| std::iter::repeat_n(name.clone(), 3)) {
            let store = store.clone();
            let get = Request::new(GetRequest { key: key(2, &name), timeout_ms: 60_000 });
            waiting.spawn(async move { store.get(get).await.map(drop) });
        }
        while store.entries().waiting.values().map(Arc::strong_count).sum::<usize>() < names.len() * 4 {
            tokio::task::yield_now().await;
        }
        for name in &names {
            store.set(Request::new(SetRequest { key: key(2, name), value: vec![1] })).await.unwrap();
            tokio::task::yield_now().await;
        }
        for done in waiting.join_all().await {
            done.unwrap();
        }
        assert_eq!(store.shared.wakeups.load(std::sync::atomic::Ordering::Relaxed), names.len() * 3);
        assert!(store.entries().waiting.is_empty());
    }

    #[tokio::test]
    async fn one_that_stops_waiting_leaves_nothing_behind() {
        let store = store();
        let get = || Request::new(GetRequest { key: key(2, "k"), timeout_ms: 1 });
        let (one, other) = tokio::join!(store.get(get()), store.get(get()));
        assert!(one.is_err() && other.is_err() && store.entries().waiting.is_empty());
        let long = Request::new(GetRequest { key: key(2, &"k".repeat(NAME_LIMIT + 1)), timeout_ms: 1 });
        assert_eq!(store.get(long).await.unwrap_err().code(), tonic::Code::ResourceExhausted);
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

    #[test]
    fn a_key_can_be_replaced_where_no_other_finds_room() {
        let values = (0..KEY_LIMIT).map(|key| (key.to_string(), Vec::new())).collect();
        let mut entries = Entries { values, ..Entries::default() };
        entries.bytes = entries.values.keys().map(String::len).sum();
        entries.put("0".to_string(), vec![7]).unwrap();
        assert!(entries.put("another".to_string(), vec![7]).is_err());
        assert!(entries.remove("1"));
        entries.put("another".to_string(), vec![7]).unwrap();
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
