//! Clients that disturb the handshake: the run continues.

use std::io::{Read, Write};
use std::net::TcpStream;

use ganglion_tests::{LIMIT, Reference, Run, SMALL_MLP, eventually};
use nix::sys::signal::Signal;

use crate::secrets::{Secrets, start, url};

const JOB: &[&str] = &["job.steps=1000000", "job.failure_deadline=5", "metrics.every_steps=1"];

#[test]
fn who_disturbs_the_handshake_disturbs_nothing_else() {
    let run = Run::new(&[SMALL_MLP, JOB]);
    let secrets = Secrets::new(&run, "certs");
    let coordinator = start(&run, &secrets, 1);
    let address = url(&run).replace("https://", "");
    run.wait_for_step(10);
    let connect = || {
        let stream = TcpStream::connect(&address).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    };
    let noise: Vec<u8> = (0..4096u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    // The first record of a handshake, followed by other bytes.
    let garbled = [&[22, 3, 1, 2, 0][..], &noise].concat();
    for said in [&noise, &garbled] {
        let mut socket = connect();
        let _ = socket.write_all(said);
        let _ = socket.read_to_end(&mut Vec::new());
    }
    eventually("a line", || coordinator.output().contains("TLS handshake failed").then_some(()));
    // Half a greeting, no greeting, and a thousand at once; all stay.
    let crowd: Vec<TcpStream> = (0..1000)
        .map(|number| {
            let mut socket = connect();
            let _ = if number % 2 == 0 { socket.write_all(&[22, 3, 1, 2, 0, 1, 0]) } else { Ok(()) };
            socket
        })
        .collect();
    let before = run.wait_for_step(1);
    run.wait_for_step(before + 50);
    for mut socket in crowd {
        // Closed, or reset: the excess ones at once, the others at their time limit.
        let _ = socket.read_to_end(&mut Vec::new());
    }
    let status = run.ask(&["status"]);
    assert_eq!(status.code, Some(0), "{}", status.output);
    coordinator.signal(Signal::SIGTERM);
    let ended = coordinator.wait();
    assert_eq!(ended.code, Some(143), "{}", ended.output);
    let count = |kind: &str| run.events().iter().filter(|event| event["kind"] == kind).count();
    assert_eq!((count("generation_formed"), count("regroup")), (1, 0), "{}", ended.output);
    let saved = run.events().into_iter().rfind(|event| event["kind"] == "checkpoint").unwrap();
    let steps = format!("job.steps={}", saved["step"]);
    Reference::of(&[SMALL_MLP, JOB, &[&steps]]).equals("a run among a crowd", &run.digest());
}
