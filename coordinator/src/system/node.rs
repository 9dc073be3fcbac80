//! Identity of the machine that a process runs on, distinct from other machines, other boots of it,
//! and other containers.
//!
//! A process number with a start time identifies a process only within one boot of one kernel, as
//! seen from one PID namespace.

use std::fmt;
use std::fs;

use serde::{Deserialize, Serialize};

/// The kernel's initial PID namespace: `PROC_PID_INIT_INO` of linux/proc_ns.h. All others belong to
/// containers.
const INITIAL: &str = "pid:[4026531836]";

/// Scope in which process numbers are meaningful. An empty text means "not known".
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Name of the host: diagnostic, and to recognise a host after a reboot.
    pub host: String,
    /// Boot id of the kernel.
    pub boot: String,
    /// The PID namespace.
    pub pids: String,
}

/// Relation of a recorded process's node to this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relation {
    /// This machine: the process can be looked up.
    Same,
    /// This machine before a reboot, or before its container was started again: the process has ended.
    Before,
    /// Another machine: the state of the process is unknown.
    Elsewhere,
}

impl Node {
    /// The node that this process runs on.
    pub fn here() -> Node {
        // Empty where /proc is not mounted. Such a record reads like one of an earlier version: its
        // process is looked up here.
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let pids = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
        let host = nix::unistd::gethostname().unwrap_or_default();
        Node {
            host: host.to_string_lossy().into_owned(),
            boot: boot.trim().to_string(),
            pids: pids.to_string_lossy().into_owned(),
        }
    }

    /// Relation of a recorded node to this one. A node that an earlier version did not record is
    /// taken for this one.
    ///
    /// A container's name may move to another machine, so another boot under the same name is a reboot only
    /// outside of containers. On the same boot a container of the same name is the one before, started again:
    /// its processes ended with it.
    pub fn relation(&self, recorded: &Node) -> Relation {
        let same_host = self.host == recorded.host;
        if recorded.boot.is_empty() {
            return Relation::Same;
        }
        if self.boot == recorded.boot {
            return match (self.pids == recorded.pids, same_host && recorded.pids != INITIAL) {
                (true, _) => Relation::Same,
                (false, true) => Relation::Before,
                (false, false) => Relation::Elsewhere,
            };
        }
        match same_host && self.pids == INITIAL && recorded.pids == INITIAL {
            true => Relation::Before,
            false => Relation::Elsewhere,
        }
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.host.is_empty() { "an unknown host" } else { &self.host })
    }
}

/// Start time of a process, in the system's ticks since boot. See proc(5), /proc/pid/stat, field 22.
pub(crate) fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses, which may hold anything.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace();
    let state = fields.next()?;
    // A zombie keeps its number until its parent reaps it, but has ended.
    if state == "Z" || state == "X" {
        return None;
    }
    // The state was field 3, so the 19th after it is field 22.
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(host: &str, boot: &str, pids: &str) -> Node {
        Node { host: host.to_string(), boot: boot.to_string(), pids: pids.to_string() }
    }

    #[test]
    fn a_reboot_a_restarted_container_and_another_host_are_told_apart() {
        let container = "pid:[4026532500]";
        let other = "pid:[4026532600]";
        for (here, recorded, relation) in [
            (node("a", "1", INITIAL), node("a", "1", INITIAL), Relation::Same),
            (node("renamed", "1", INITIAL), node("a", "1", INITIAL), Relation::Same),
            (node("a", "2", INITIAL), node("a", "1", INITIAL), Relation::Before),
            (node("b", "2", INITIAL), node("a", "1", INITIAL), Relation::Elsewhere),
            (node("a", "1", INITIAL), node("", "", ""), Relation::Same),
            (node("c", "1", container), node("c", "1", other), Relation::Before),
            (node("d", "1", container), node("c", "1", other), Relation::Elsewhere),
            (node("a", "1", container), node("a", "1", INITIAL), Relation::Elsewhere),
            // A pod's name may be given to a pod on another machine while this one is cut off.
            (node("pod-0", "2", container), node("pod-0", "1", other), Relation::Elsewhere),
        ] {
            assert_eq!(here.relation(&recorded), relation, "{recorded:?} seen from {here:?}");
        }
        assert_eq!(Node::here().relation(&Node::here()), Relation::Same);
        assert!(!Node::here().boot.is_empty() && Node::here().pids.starts_with("pid:["));
    }
}
