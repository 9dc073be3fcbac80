//! Messages of the rounds between ranks of one host: they go through memory that these share.
//!
//! In a round in which any of them has such a message, each rank of the host publishes its slot once, with
//! all that it has for the others, and reads theirs. Where a message lies follows from the sender's plan.

use super::floats;
use super::plan::{Message, Plan, Round};
use crate::engine::reduce::ShardMap;
use crate::engine::reduce::shared::Memory;

/// The rounds through memory.
pub(super) struct Near {
    pub(super) memory: Memory,
    towards: Vec<NearRound>,
    back: Vec<NearRound>,
}

/// One round through memory.
pub(super) struct NearRound {
    /// Messages of this rank, one after the other in its slot.
    pub(super) sends: Vec<Message>,
    /// Messages for this rank.
    pub(super) receives: Vec<Came>,
    /// Whether any rank of the host has a message.
    pub(super) is_busy: bool,
}

/// Message in the slot of another rank.
pub(super) struct Came {
    pub(super) message: Message,
    /// Place of the sender among the ranks of the host.
    pub(super) sender: usize,
    /// Offset in its slot, in floats.
    pub(super) offset: usize,
}

impl Near {
    /// Takes the messages between the ranks that share `memory` out of a plan.
    pub(super) fn new(memory: Memory, shards: &ShardMap, plan: &mut Plan, chunk: usize) -> Near {
        let ranks = memory.ranks();
        let own = ranks.iter().position(|rank| *rank == shards.rank).expect("it shares the memory");
        let plans: Vec<Plan> = ranks.iter().map(|rank| plan_of(shards, *rank)).collect();
        let rounds = |of: fn(&Plan) -> &Vec<Round>| {
            let of_ranks: Vec<&Vec<Round>> = plans.iter().map(of).collect();
            (0..of_ranks[own].len()).map(|at| NearRound::of(ranks, own, &of_ranks, at, chunk)).collect()
        };
        let (towards, back) = (rounds(|plan| &plan.towards), rounds(|plan| &plan.back));
        for round in plan.towards.iter_mut().chain(&mut plan.back) {
            round.sends.retain(|message| !ranks.contains(&message.rank));
            round.receives.retain(|message| !ranks.contains(&message.rank));
        }
        Near { towards, back, memory }
    }

    pub(super) fn round(&self, place: usize, is_back: bool) -> &NearRound {
        if is_back { &self.back[place] } else { &self.towards[place] }
    }

    /// Number of floats that a slot needs for the messages between these ranks.
    pub(super) fn slot(shards: &ShardMap, ranks: &[usize], chunk: usize) -> usize {
        let of_round = |round: &Round| near(ranks, &round.sends).map(|message| floats(message, chunk)).sum();
        let of_rank = |rank: &usize| {
            let plan = plan_of(shards, *rank);
            plan.towards.iter().chain(&plan.back).map(of_round).max().unwrap_or(0)
        };
        ranks.iter().map(of_rank).max().unwrap_or(0)
    }
}

impl NearRound {
    fn of(ranks: &[usize], own: usize, plans: &[&Vec<Round>], at: usize, chunk: usize) -> NearRound {
        let round = &plans[own][at];
        let came = |message: &Message| {
            let sender = ranks.iter().position(|rank| *rank == message.rank).expect("a rank of the host");
            let before = near(ranks, &plans[sender][at].sends).take_while(|theirs| theirs.rank != ranks[own]);
            let offset = before.map(|theirs| floats(theirs, chunk)).sum();
            Came { message: message.clone(), sender, offset }
        };
        NearRound {
            sends: near(ranks, &round.sends).cloned().collect(),
            receives: near(ranks, &round.receives).map(came).collect(),
            is_busy: plans.iter().any(|rounds| near(ranks, &rounds[at].sends).next().is_some()),
        }
    }
}

fn plan_of(shards: &ShardMap, rank: usize) -> Plan {
    Plan::new(&ShardMap { rank, ..shards.clone() })
}

/// Those of some messages whose other side is one of these ranks.
fn near<'a>(ranks: &'a [usize], messages: &'a [Message]) -> impl Iterator<Item = &'a Message> {
    messages.iter().filter(|message| ranks.contains(&message.rank))
}
