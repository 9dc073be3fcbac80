use std::collections::BTreeSet;

use super::*;
use crate::evaluation::EvaluationRow;

const LIMIT: usize = 1 << 20;

/// A line of each kind as it has always been written: readers outside the project rely on them.
#[rustfmt::skip]
const LINES: [&str; 45] = [
    r#"{"time":1.5,"kind":"checkpoint","folder":"step-00000020","phase":0,"state_digest":"ab","step":20}"#,
    r#"{"time":1.5,"kind":"evaluation","features":"digits 0a","metrics":{"frechet_distance":2.5,"kid":null},"seconds":0.25,"step":20}"#,
    r#"{"time":1.5,"kind":"evaluation","features":"none","held_out":96,"metrics":{"nll":2.5},"seconds":0.25,"step":20}"#,
    r#"{"time":1.5,"kind":"best_checkpoint","folder":"step-00000020","metric":"kid","step":20,"value":2.5}"#,
    r#"{"time":1.5,"kind":"coordinator_started","address":"http://127.0.0.1:1","dashboard":null,"format":1,"pid":7,"term":2}"#,
    r#"{"time":1.5,"kind":"run_ended","detail":"Terminate","outcome":"stopped"}"#,
    r#"{"time":1.5,"kind":"stop_requested"}"#,
    r#"{"time":1.5,"kind":"staying"}"#,
    r#"{"time":1.5,"kind":"data","found":{"channels":1,"class_count":1,"class_rule":"folders","classes":[{"name":"a","samples":5}],"greatest":[28,28],"height":28,"image_rule":"","least":[28,28],"left_out":{".gif":{"count":1,"example":"a.gif"}},"samples":5,"turned":0,"width":28}}"#,
    r#"{"time":1.5,"kind":"passport","items":{"cpu":"x","numerics":"1"}}"#,
    r#"{"time":1.5,"kind":"worker_started","local_rank":0,"pid":7}"#,
    r#"{"time":1.5,"kind":"worker_exited","pid":7,"status":"exit status: 0","worker":null}"#,
    r#"{"time":1.5,"kind":"worker_joined","host":"node","local":true,"pid":7,"worker":3}"#,
    r#"{"time":1.5,"kind":"worker_resumed","host":"node","local":false,"pid":7,"worker":3}"#,
    r#"{"time":1.5,"kind":"worker_disconnected","worker":3}"#,
    r#"{"time":1.5,"kind":"worker_lost","pid":null,"reason":"it was silent for too long","worker":3}"#,
    r#"{"time":1.5,"kind":"worker_leaves","worker":3}"#,
    r#"{"time":1.5,"kind":"worker_dropped","worker":3}"#,
    r#"{"time":1.5,"kind":"worker_refused","reason":"the run is ending","worker":3}"#,
    r#"{"time":1.5,"kind":"replacing_given_up","reason":"why"}"#,
    r#"{"time":1.5,"kind":"drain_requested","worker":3}"#,
    r#"{"time":1.5,"kind":"scale_requested","workers":2}"#,
    r#"{"time":1.5,"kind":"generation_formed","backend":"gloo","cause":"gathered","generation":1,"members":[{"pid":7,"rank":0,"shards":[0,4],"worker":3},{"pid":null,"rank":1,"shards":[4,8],"worker":4}],"position":0,"start":"fresh","world_size":2}"#,
    r#"{"time":1.5,"kind":"generation_kept","generation":1,"term":2,"world_size":2}"#,
    r#"{"time":1.5,"kind":"regroup","generation":1,"reason":"planned"}"#,
    r#"{"time":1.5,"kind":"condemned","generation":1}"#,
    r#"{"time":1.5,"kind":"plan","change":"regroup","plan":1}"#,
    r#"{"time":1.5,"kind":"fault","detail":"[1, 2]","fault":"links","generation":1,"worker":3}"#,
    r#"{"time":1.5,"kind":"phase_skipped","position":5,"reason":"why","step":3}"#,
    r#"{"time":1.5,"kind":"skip_allowed","position":5}"#,
    r#"{"time":1.5,"kind":"samples_excluded","after_phase":0,"after_step":4,"files":["a.png"]}"#,
    r#"{"time":1.5,"kind":"checkpoint_delayed","file":"manifest.json","reason":"why","step":20}"#,
    r#"{"time":1.5,"kind":"checkpoint_abandoned","step":20}"#,
    r#"{"time":1.5,"kind":"checkpoint_damaged","folder":"step-00000020","instead":"the start","reason":"why"}"#,
    r#"{"time":1.5,"kind":"checkpoint_missing","folder":"step-00000020","instead":"the start","place":"/a","step":20}"#,
    r#"{"time":1.5,"kind":"samples","file":"samples/step-00000020.png","step":20}"#,
    r#"{"time":1.5,"kind":"real_samples","file":"samples/real.png"}"#,
    r#"{"time":1.5,"kind":"evaluation_breach","detail":"why","step":20}"#,
    r#"{"time":1.5,"kind":"alarm","alarm":"collapse","detail":"why","step":20}"#,
    r#"{"time":1.5,"kind":"alarm_over","alarm":"collapse","step":20}"#,
    r#"{"time":1.5,"kind":"metrics_breach","detail":"why"}"#,
    r#"{"time":1.5,"kind":"metrics_lost","count":2,"first":3,"last":4}"#,
    r#"{"time":1.5,"kind":"events_dropped","count":2}"#,
    r#"{"time":1.5,"kind":"record_set_aside","aside":"metrics.jsonl.damaged-1","file":"metrics.jsonl","kept":4,"lost":1,"steps":[[3,7]]}"#,
    r#"{"time":1.5,"kind":"journal_recovered","floor":9,"lost":["terms"]}"#,
];

fn parse(line: &str) -> EventLine {
    EventLine::parse(line.as_bytes()).unwrap()
}

fn written(event: &RunEvent) -> String {
    String::from_utf8(event.line(1.5, LIMIT)).unwrap()
}

#[test]
fn every_kind_has_the_line_that_it_always_had() {
    let mut kinds = BTreeSet::new();
    for line in LINES {
        let event = parse(line).event.unwrap();
        assert_eq!(written(&event), line);
        kinds.insert(event.kind());
        // The described keys are those of the line.
        let keys: BTreeSet<String> = event.keys().into_iter().map(|(key, _)| key).collect();
        let described = event
            .kind()
            .fields()
            .iter()
            .filter(|field| !["held_out", "left_out", "worker"].contains(&field.name));
        let described: BTreeSet<String> = described.map(|field| field.name.to_string()).collect();
        assert!(keys.is_superset(&described), "{line}");
    }
    assert_eq!(kinds, EventKind::ALL.iter().copied().collect());
    let delayed = RunEvent::CheckpointDelayed {
        file: "a".to_string(),
        left_out: 2,
        reason: "why".to_string(),
        step: 20,
        worker: Some(3),
    };
    let line = r#"{"time":1.5,"kind":"checkpoint_delayed","file":"a","left_out":2,"reason":"why","step":20,"worker":3}"#;
    assert_eq!(written(&delayed), line);
}

#[test]
fn a_line_of_another_version_is_read_as_far_as_it_is_known() {
    let later = parse(r#"{"time":2.0,"kind":"worker_promoted","worker":3}"#);
    assert!(matches!(later.event, Err(Unread::OtherVersion)));
    assert_eq!((later.time, later.kind.as_str()), (2.0, "worker_promoted"));
    let before_formats = parse(r#"{"time":2.0,"kind":"coordinator_started","pid":7,"term":2}"#);
    assert!(matches!(before_formats.event, Ok(RunEvent::CoordinatorStarted { format: None, term: 2, .. })));
    let more = parse(r#"{"time":2.0,"kind":"worker_leaves","worker":3,"why":"spot"}"#);
    assert_eq!(more.event.unwrap(), RunEvent::WorkerLeaves { worker: 3 });
    let fewer = parse(r#"{"time":2.0,"kind":"fault","worker":3,"fault":"cosmic_ray"}"#);
    let RunEvent::Fault { fault, generation, .. } = fewer.event.unwrap() else { panic!("not a fault") };
    assert_eq!((fault, generation), (FaultKind::Unknown, 0));
    assert!(matches!(parse(r#"{"time":2.0,"kind":"data","found":5}"#).event, Err(Unread::Broken(_))));
    for line in ["", "{", "[]", "{}", r#"{"time":"x","kind":5}"#, r#"{"kind":"staying"}"#] {
        assert!(EventLine::parse(line.as_bytes()).is_err(), "{line}");
    }
}

#[test]
fn a_line_that_would_be_too_long_tells_its_length_instead() {
    let long = RunEvent::MetricsBreach { detail: "x".repeat(100) };
    let line = String::from_utf8(long.line(1.0, 100)).unwrap();
    assert_eq!(line, r#"{"time":1.0,"kind":"metrics_breach","bytes_left_out":148}"#);
    assert!(matches!(parse(&line).event, Err(Unread::LeftOut)));
}

#[test]
fn enumerations_have_the_names_of_their_lines() {
    assert_eq!(
        FaultKind::ALL.map(FaultKind::name),
        ["peer", "timeout", "links", "diverged", "internal", "non_finite"]
    );
    assert_eq!(RunOutcome::InputError.name(), "input_error");
    for kind in EventKind::ALL {
        assert_eq!(EventKind::of(kind.name()), Some(*kind));
        assert!(!kind.doc().is_empty() && kind.doc().ends_with('.'), "{}", kind.name());
    }
}

/// The columns of a row in their order, and the numbers that are not finite.
#[test]
fn a_row_is_read_back_as_it_was_written() {
    let line = concat!(
        r#"{"step":10,"images_seen":640,"ledger":"0000feed0000000a","skipped":2,"loss_discriminator":1.25,"#,
        r#""loss_generator":null,"epoch":0.5,"time":1700000000.5,"generation":3,"world_size":2,"#,
        r#""images_per_second":null,"gpu_memory_bytes":5,"gpu_utilisation":97,"#,
        r#""profile":{"model":{"data":0.1,"compute":2.0,"wait":0.0,"commit":0.0,"other":0.0}}}"#,
    );
    let row: MetricsRow = serde_json::from_str(line).unwrap();
    assert_eq!(row.line(), line);
    assert_eq!(
        row.scalars.iter().map(|(name, _)| name).collect::<Vec<_>>(),
        ["loss_discriminator", "loss_generator"]
    );
    let keys: serde_json::Value = serde_json::from_str(line).unwrap();
    for column in MetricsRow::FIELDS.iter().filter(|column| column.name != "scalars") {
        assert!(keys.get(column.name).is_some(), "{}", column.name);
    }
    let later = line.replace("\"epoch\"", "\"host\":\"a\",\"epoch\"");
    assert_eq!(serde_json::from_str::<MetricsRow>(&later).unwrap().line(), line);
    assert!(serde_json::from_str::<MetricsRow>(&line.replace("0000feed", "feed")).is_err());
}

#[test]
fn an_evaluations_metrics_are_ordered_by_name() {
    let metrics: Scalars = [("kid", 1.0), ("diversity", 0.5)].into_iter().collect();
    let row = EvaluationRow { metrics: metrics.sorted(), ..EvaluationRow::default() };
    assert!(written(&RunEvent::Evaluation(row)).contains(r#""metrics":{"diversity":0.5,"kid":1.0}"#));
}

fn read(names: &[&str]) -> Result<Scalars, Malformed> {
    of_row(names.iter().map(|name| wire::Scalar { name: (*name).to_string(), value: 1.5 }).collect())
}

#[test]
fn scalars_keep_their_order_and_their_bits() {
    let scalars: Scalars = [("recon", 0.1 + 0.2), ("kl", f64::NEG_INFINITY)].into_iter().collect();
    let read = of_row(to_wire(&scalars)).unwrap();
    assert_eq!(read, scalars);
    assert_eq!(read.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["recon", "kl"]);
}

#[test]
fn scalars_that_cannot_be_columns_are_refused() {
    for (names, text) in [
        (&["time"][..], "named time, as a fixed column is"),
        (&["rows"], "give it another name"),
        (&["commit"], "give it another name"),
        (&["kl", "recon", "kl"], "the scalar kl comes twice"),
        (&[""], "\"\" is not the name of a scalar"),
        (&["Kl"], "lower-case letters"),
        (&["a\"b"], "is not the name of a scalar"),
        (&[&"x".repeat(NAME_BYTES + 1)], "1 to 64"),
    ] {
        let refused = read(names).unwrap_err().to_string();
        assert!(refused.contains(text), "{refused}");
    }
    let many: Vec<String> = (0..=SCALARS).map(|at| format!("s{at}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert_eq!(
        read(&many).unwrap_err().to_string(),
        "malformed message: the list of scalars has 65 items, and at most 64 are allowed"
    );
    assert!(read(&many[1..]).is_ok() && read(&[]).is_ok());
}
