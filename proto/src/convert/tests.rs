use std::collections::BTreeMap;

use super::*;

/// A welcome carries the job as the text that [`Job::to_toml`] gives, and refuses any other.
#[test]
fn a_welcome_survives_the_wire_with_its_job() {
    let job = crate::job::sample_of_all();
    let welcome = Welcome {
        term: Term(4),
        worker: WorkerId(1),
        run: "r".into(),
        job,
        storage: "/s".into(),
        condemned: Generation(0),
    };
    let message = ToWorker::Welcome(Box::new(welcome));
    let sent = message.clone().to_wire(Term(4));
    assert_eq!(ToWorker::from_wire(sent.clone()), Ok((Term(4), message)));
    let Some(wire::session_response::Message::Welcome(mut welcome)) = sent.message else { unreachable!() };
    welcome.job_toml.push_str("momentum = 0.9\n");
    let other = Some(wire::session_response::Message::Welcome(welcome));
    let refused = ToWorker::from_wire(wire::SessionResponse { term: 4, message: other }).unwrap_err();
    assert!(refused.to_string().contains("momentum"), "{refused}");
}

fn file() -> StoredFile {
    StoredFile { file: "state-00001-of-00002.safetensors".into(), bytes: 9, blake3: "a".repeat(64) }
}

fn hello() -> Hello {
    Hello {
        protocol: 1,
        spawn_token: None,
        host: "h".into(),
        pid: 2,
        address: String::new(),
        resume: None,
        device: "cpu".into(),
        attempt: 5,
    }
}

fn resume() -> Resume {
    let rest = Some(Rested { position: Some(Position(4)), finished: Some(true) });
    Resume { run: "r".into(), worker: WorkerId(1), term: Term(2), generation: Generation(3), rest }
}

#[test]
fn a_workers_messages_survive_the_wire() {
    let stretch = Stretch { start: 1000, len: 2072, ends: vec![7; 24], subtrees: vec![[1; 32], [2; 32]] };
    let share = Share { total: 4000, stretches: vec![stretch] };
    let part =
        WrittenPart { step: 1, phase: 0, index: 1, count: 4, file: file(), fingerprint: u64::MAX, share };
    let row = MetricsRow {
        step: 1,
        time: 2.5,
        generation: 3,
        world_size: 4,
        scalars: [("kl", 5.5), ("recon", 6.5)].into_iter().collect(),
        epoch: 0.25,
        images_per_second: 7.5,
        images_seen: 8,
        ledger: u64::MAX,
        skipped: 9,
        profile: [("model", Profile { wait: 0.5, ..Profile::default() })].into_iter().collect(),
        gpu_memory_bytes: Some(1 << 33),
        gpu_utilisation: Some(0),
    };
    let passport = Passport(BTreeMap::from([("cpu".to_string(), "x".to_string())]));
    let loaded = LoadedFacts {
        passport,
        samples: 5,
        sees_storage: true,
        shape: StepShape::new(3, vec![0, 2]).unwrap(),
        gpu: None,
        host: None,
        left_out: Vec::new(),
    };
    let elsewhere = LoadedFacts { gpu: Some("h/0".into()), host: Some("h".into()), ..loaded.clone() };
    let non_finite = |stop| Fault::NonFinite { position: Position(6), detail: "x".into(), stop };
    let messages = [
        FromWorker::Hello(Hello { address: "h:1".into(), resume: Some(resume()), ..hello() }),
        FromWorker::Hello(hello()),
        FromWorker::Leave,
        FromWorker::Fault(Generation(1), Fault::Links(vec![Rank(2), Rank(0)])),
        FromWorker::Loaded(LoadedFacts { left_out: vec![3, 9], ..elsewhere }, None),
        FromWorker::Loaded(loaded, Some(Box::default())),
        FromWorker::Ready(Generation(1), None),
        FromWorker::Ready(Generation(1), Some(Position(7))),
        FromWorker::Fault(Generation(1), Fault::Timeout),
        FromWorker::AddressesWanted(Generation(1)),
        FromWorker::Heartbeat(
            Progress {
                position: Position(3),
                leaves: 4,
                activity: Activity::Waiting,
                slowest_leaf: Duration::from_micros(5),
            },
            Usage { resident_bytes: Some(6), gpu: GpuUse { memory_bytes: None, utilisation: Some(7) } },
        ),
        FromWorker::Heartbeat(
            Progress { activity: Activity::Paused, ..Progress::default() },
            Usage { resident_bytes: None, gpu: GpuUse::default() },
        ),
        FromWorker::Fault(Generation(1), non_finite(false)),
        FromWorker::Fault(Generation(1), non_finite(true)),
        FromWorker::PhaseSkipped(Position(6), "x".into()),
        FromWorker::PartWritten(Generation(7), part),
        FromWorker::Metrics(row),
        FromWorker::Finished(Generation(2), Position(9), true),
        FromWorker::InputError("no".into()),
    ];
    for message in messages {
        let read = FromWorker::from_wire(message.clone().to_wire(Term(4)));
        assert_eq!(read, Ok((Term(4), message)));
    }
}

/// No text of a peer reaches a terminal as it is.
#[test]
fn a_strange_token_is_safe_to_show() {
    let strange = Hello { spawn_token: Some("\x1b[2J".into()), ..hello() };
    let read = FromWorker::from_wire(FromWorker::Hello(strange).to_wire(Term(0)));
    let Ok((_, FromWorker::Hello(read))) = read else { panic!("{read:?}") };
    assert_eq!(
        read.spawn_token.as_deref(),
        Some("\\u{1b}[2J"),
        "no text of a peer reaches a terminal as it is"
    );
}

/// Assignment of the first rank of a group that shares `data_shards`; the ranks of which `is_blind` is true
/// write no parts.
fn assignment(workers: &[u64], data_shards: u32, is_blind: impl Fn(usize) -> bool) -> Assignment {
    let ranges = shard_ranges(data_shards, u32::try_from(workers.len()).unwrap());
    let member = |(rank, shards)| GroupMember {
        worker: WorkerId(workers[rank]),
        shards,
        writes_parts: !is_blind(rank),
    };
    let group = Group {
        generation: Generation(3),
        members: ranges.into_iter().enumerate().map(member).collect(),
        position: Position(8),
        start: Start::Healed(Rank(0)),
        skips: vec![Position(9), Position(12)],
        backend: Backend::Nccl,
    };
    Assignment { group, rank: 0 }
}

#[test]
fn an_assignment_survives_the_wire_with_the_ranges_of_its_ranks() {
    let mut sent = assignment(&[1, 5, 4], 7, |rank| rank == 1);
    let (position, state_digest) = (Position(8), "c".repeat(64));
    let checkpoint = Checkpoint { position, step: 4, phase: 0, files: vec![file()], state_digest };
    sent.group.start = Start::Checkpoint(Rank(1), checkpoint);
    sent.rank = 2;
    let read = assignment_from_wire(assignment_to_wire(sent.clone())).unwrap();
    let ranges: Vec<_> = read.group.members.iter().map(|member| member.shards.clone()).collect();
    assert_eq!(ranges, [0..2, 2..4, 4..7]);
    assert_eq!(read, sent);
}

/// A worker trusts the ranges and the ranks: with others it would leave a shard out of the sum, or count it
/// twice (D2).
#[test]
fn an_assignment_that_deals_no_group_is_refused() {
    let sound = assignment_to_wire(assignment(&[1, 5], 6, |_| true));
    assert!(assignment_from_wire(sound.clone()).is_ok());
    let mend = |change: &dyn Fn(&mut wire::Assignment)| {
        let mut changed = sound.clone();
        change(&mut changed);
        assignment_from_wire(changed).unwrap_err().to_string()
    };
    let too_few = mend(&|wire| wire.data_shards = 1);
    assert_eq!(too_few, "malformed message: 2 workers cannot share 1 data shards");
    mend(&|wire| wire.data_shards = 0);
    mend(&|wire| wire.workers.clear());
    mend(&|wire| wire.workers = vec![bounds::COUNT + 1, 1]);
    mend(&|wire| (wire.workers, wire.data_shards) = (vec![1; bounds::MEMBERS + 1], u32::MAX));
    for without_parts in [vec![1, 0], vec![1, 1], vec![2], vec![0, u32::MAX]] {
        mend(&|wire| wire.without_parts.clone_from(&without_parts));
    }
    mend(&|wire| wire.rank = 2);
    mend(&|wire| wire.start = Some(wire::assignment::Start::Healed(wire::HealedStart { source: 2 })));
    mend(&|wire| wire.backend = 0);
}

/// All members receive the whole list, so a regroup sends the square of this.
#[test]
fn an_assignment_of_thousands_takes_a_few_bytes_for_each() {
    use prost::Message;
    for (members, limit) in [(2000, 8 << 10), (4096, 24 << 10)] {
        // Numbers as after many losses, and the greatest list of ranks: only the first writes parts.
        let workers: Vec<u64> = (10_000..).take(members).collect();
        let sent = assignment(&workers, 4096, |rank| rank > 0);
        let bytes = ToWorker::Assignment(sent.clone()).to_wire(Term(1)).encoded_len();
        assert!(bytes <= limit, "{bytes} bytes for {members}");
        let all_write = ToWorker::Assignment(assignment(&workers, 4096, |_| false));
        let bytes = all_write.to_wire(Term(1)).encoded_len();
        assert!(bytes <= limit * 2 / 3, "{bytes} bytes for {members} that all write parts");
        assert_eq!(assignment_from_wire(assignment_to_wire(sent.clone())), Ok(sent));
    }
}

#[test]
fn addresses_survive_the_wire_and_are_bounded() {
    let addresses = vec![Some("10.0.0.1:7".to_string()), None, Some("h:1".to_string())];
    for addresses in [addresses, Vec::new()] {
        let told = ToWorker::Addresses(Generation(3), addresses);
        assert_eq!(ToWorker::from_wire(told.clone().to_wire(Term(4))), Ok((Term(4), told)));
    }
    let refused = |generation, addresses| {
        let message =
            Some(wire::session_response::Message::Addresses(wire::Addresses { generation, addresses }));
        ToWorker::from_wire(wire::SessionResponse { term: 4, message }).is_err()
    };
    assert!(refused(bounds::COUNT + 1, Vec::new()));
    assert!(refused(3, vec!["x".repeat(bounds::NAME + 1)]));
    assert!(refused(3, vec![String::new(); bounds::MEMBERS + 1]));
}

#[test]
fn a_file_name_that_leaves_its_folder_is_refused() {
    for name in ["../x", "a/b", "", ".run", "a\0b"] {
        let wire = wire::StoredFile { file: name.into(), bytes: 0, blake3: "a".repeat(64) };
        assert!(file_from_wire(wire).is_err(), "{name:?}");
    }
}

#[test]
fn an_empty_message_is_malformed() {
    let empty = wire::SessionRequest { term: 1, message: None };
    assert!(FromWorker::from_wire(empty).is_err());
}

/// No content of a message makes the conversion panic, and accepted content is within its bounds.
mod hostile {
    use proptest::prelude::*;
    use prost::Message;

    use super::*;

    fn number() -> impl Strategy<Value = u64> {
        prop_oneof![
            Just(0),
            Just(bounds::COUNT),
            Just(bounds::COUNT + 1),
            Just(i64::MAX as u64),
            Just(i64::MAX as u64 + 1),
            Just(u64::MAX),
            any::<u64>()
        ]
    }

    fn words() -> impl Strategy<Value = String> {
        let sizes = prop_oneof![Just(0usize), Just(1), Just(bounds::NAME + 1), Just(bounds::TEXT + 1)];
        prop_oneof![
            ".{0,40}",
            (sizes, prop::sample::select(vec!["x", "\x1b[2J", "\u{202e}", "漢", "\0", "\n"]))
                .prop_map(|(size, text)| text.repeat(size)),
        ]
    }

    prop_compose! {
        fn fault()(generation in number(), kind in -1..9i32, detail in words(), position in number(),
            length in prop_oneof![Just(0usize), Just(3), Just(bounds::MEMBERS + 1)]) -> wire::Fault {
            wire::Fault { generation, kind, detail, ranks: vec![u32::MAX; length], position }
        }
    }

    prop_compose! {
        fn hello()(protocol: u32, spawn_token in words(), host in words(), pid: u32, address in words(),
            device in words(), run in words(), resumed: bool, worker in number(), term in number(),
            generation in number(), position in proptest::option::of(number())) -> wire::Hello {
            let rested = Some(wire::Rested { position, finished: None });
            let resume = resumed.then_some(wire::Resume { run, worker, term, generation, rested });
            wire::Hello { protocol, spawn_token, host, pid, address, resume, device, attempt: generation }
        }
    }

    prop_compose! {
        fn loaded()(items in 0usize..70, item in words(), value in words(), samples in number(),
            phases_per_step: u32, data_phases in proptest::collection::vec(0..4u32, 0..3), gpu in words()) -> wire::Loaded {
            let passport = (0..items).map(|number| (format!("{item}{number}"), value.clone())).collect();
            wire::Loaded { passport, samples, sees_storage: true, phases_per_step, data_phases, gpu, ..wire::Loaded::default() }
        }
    }

    prop_compose! {
        fn part()(generation in number(), step in number(), phase: u32, index: u32, count: u32, file in words(), bytes in number(),
            start in number(), subtrees in proptest::collection::vec(0u8..3, 0..100)) -> wire::PartWritten {
            let file = Some(wire::StoredFile { file, bytes, blake3: "a".repeat(64) });
            let stretches = vec![wire::Stretch { start, bytes, ends: subtrees.clone(), subtrees }];
            let (fingerprint, digest_bytes) = (start, bytes);
            wire::PartWritten { generation, step, phase, index, count, file, fingerprint, digest_bytes, stretches }
        }
    }

    prop_compose! {
        fn row()(step in number(), generation in number(), images_seen in number(), ledger in number(),
            skipped in number(), time: f64, names in proptest::collection::vec(words(), 0..3), value: f64) -> wire::MetricsRow {
            let scalars = names.into_iter().map(|name| wire::Scalar { name, value }).collect();
            wire::MetricsRow { step, generation, images_seen, ledger, skipped, time, scalars,
                ..wire::MetricsRow::default() }
        }
    }

    prop_compose! {
        fn told_assignment()(generation in number(), position in number(), rank in 0..6u32, source in 0..6u32,
            workers in proptest::collection::vec(number(), 0..6), data_shards in prop_oneof![0..8u32, any::<u32>()],
            without_parts in proptest::collection::vec(0..6u32, 0..4)) -> wire::Assignment {
            let start = Some(wire::assignment::Start::Healed(wire::HealedStart { source }));
            wire::Assignment { generation, rank, position, start, skips: Vec::new(), backend: 1,
                workers, data_shards, without_parts }
        }
    }

    fn told() -> impl Strategy<Value = wire::session_response::Message> {
        use wire::session_response::Message as Told;
        let lengths = prop_oneof![Just(0usize), Just(3), Just(bounds::MEMBERS + 1)];
        prop_oneof![
            told_assignment().prop_map(Told::Assignment),
            (number(), words(), lengths).prop_map(|(generation, address, length)| {
                Told::Addresses(wire::Addresses { generation, addresses: vec![address; length] })
            }),
        ]
    }

    fn said() -> impl Strategy<Value = wire::session_request::Message> {
        use wire::session_request::Message as Said;
        prop_oneof![
            fault().prop_map(Said::Fault),
            hello().prop_map(Said::Hello),
            loaded().prop_map(Said::Loaded),
            part().prop_map(Said::PartWritten),
            row().prop_map(Said::Metrics),
            (number(), proptest::option::of(number()))
                .prop_map(|(generation, position)| Said::Ready(wire::Ready { generation, position })),
            (number(), -1..5i32, number(), number()).prop_map(
                |(position, activity, leaves, slowest_leaf_us)| {
                    Said::Heartbeat(wire::Heartbeat {
                        position,
                        activity,
                        leaves,
                        slowest_leaf_us,
                        ..Default::default()
                    })
                }
            ),
            (number(), words(), words())
                .prop_map(|(step, file, detail)| Said::PartDelayed(wire::PartDelayed { step, file, detail })),
            (number(), words())
                .prop_map(|(position, detail)| Said::PhaseSkipped(wire::PhaseSkipped { position, detail })),
            (number(), number(), any::<bool>()).prop_map(|(generation, position, complete)| {
                Said::Finished(wire::Finished { generation, position, complete })
            }),
            words().prop_map(|detail| Said::InputError(wire::InputError { detail })),
            number().prop_map(|generation| Said::AddressesWanted(wire::AddressesWanted { generation })),
            (number(), any::<u32>(), any::<u32>(), any::<u32>()).prop_map(
                |(step, width, height, channels)| {
                    Said::Samples(wire::SampleGrid { step, width, height, channels, ..Default::default() })
                }
            ),
            (number(), words()).prop_map(|(step, text)| Said::Texts(wire::SampleTexts { step, text })),
            (number(), 0usize..70, words(), words()).prop_map(|(step, figures, name, features)| {
                let figures = vec![wire::Figure { name, value: f64::NAN }; figures];
                Said::Evaluation(wire::EvaluationRow {
                    step,
                    figures,
                    features,
                    seconds: f64::INFINITY,
                    held_out: 0,
                })
            }),
        ]
    }

    proptest! {
        #[test]
        fn extreme_messages_of_workers_are_refused_or_bounded(term in number(), message in said()) {
            let request = wire::SessionRequest { term, message: Some(message) };
            if let Ok((term, read)) = FromWorker::from_wire(request) {
                prop_assert!(term.0 <= bounds::COUNT);
                // Debug escapes the backslashes of texts that are already escaped.
                let shown = format!("{read:?}").replace("\\\\u{", "");
                prop_assert!(!shown.contains('\u{1b}') && !shown.contains("\\u{1b}"), "{shown}");
                let again = read.clone().to_wire(term);
                prop_assert!(again.encoded_len() < 2 << 20, "{} bytes", again.encoded_len());
                // An accepted message is accepted again: a worker that comes back repeats it.
                if !matches!(read, FromWorker::Metrics(_) | FromWorker::Evaluation(_)) {
                    prop_assert_eq!(FromWorker::from_wire(again), Ok((term, read)));
                }
            }
        }

        #[test]
        fn groups_survive_the_wire(data_shards in 1..400u32, size in 1..400u32, numbers: u64, blind: u64) {
            let workers: Vec<u64> =
                (0..u64::from(size.min(data_shards))).map(|rank| numbers.wrapping_mul(rank + 1) & bounds::COUNT).collect();
            let sent = assignment(&workers, data_shards, |rank| blind >> (rank % 64) & 1 == 1);
            prop_assert_eq!(assignment_from_wire(assignment_to_wire(sent.clone())), Ok(sent));
        }

        #[test]
        fn extreme_messages_of_coordinators_are_refused_or_bounded(message in told()) {
            let response = wire::SessionResponse { term: 1, message: Some(message) };
            if let Ok((term, read)) = ToWorker::from_wire(response) {
                if let ToWorker::Assignment(Assignment { group, rank }) = &read {
                    // Every shard belongs to one rank (D2), and the rank is one of the group.
                    let (first, last) = (&group.members[0], &group.members[group.members.len() - 1]);
                    prop_assert!(first.shards.start == 0 && last.shards.end as usize >= group.members.len());
                    prop_assert!(group.members.windows(2).all(|pair| pair[0].shards.end == pair[1].shards.start));
                    prop_assert!(group.members.iter().all(|member| !member.shards.is_empty()));
                    prop_assert!((*rank as usize) < group.members.len());
                }
                prop_assert_eq!(ToWorker::from_wire(read.clone().to_wire(term)), Ok((term, read)));
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(request) = wire::SessionRequest::decode(&bytes[..]) {
                let _ = FromWorker::from_wire(request);
            }
            if let Ok(response) = wire::SessionResponse::decode(&bytes[..]) {
                let _ = ToWorker::from_wire(response);
            }
            if let Ok(status) = wire::GetStatusResponse::decode(&bytes[..]) {
                let _ = checked_status(status);
            }
            let _ = crate::rows::decode(&bytes);
        }
    }
}

#[test]
fn texts_of_a_model_are_cut_and_keep_of_control_characters_lines_and_tabulators() {
    let read = |text: String| texts_from_wire(wire::SampleTexts { step: 7, text }).unwrap();
    let shown = read("a\tb\n\u{1b}[31mc\0\r".to_string());
    assert_eq!((shown.step, shown.text.as_str()), (7, "a\tb\n\u{fffd}[31mc\u{fffd}\u{fffd}"));
    let long = read(format!("x{}", "é".repeat(bounds::SAMPLE_TEXT)));
    assert_eq!(long.text.len(), bounds::SAMPLE_TEXT - 1);
    assert!(texts_from_wire(wire::SampleTexts { step: u64::MAX, text: String::new() }).is_err());
}
