//! Forming, breaking up and changing of groups.

use super::*;
use crate::backend::Backend;
use crate::events::{GroupMember, Start};
use crate::shards::shard_ranges;
use crate::types::Rank;

/// Divergences in a row after which a machine of the run must be faulty.
const DIVERGENCES: u32 = 3;
/// Largest number of phases by which a run may be rolled back; beyond it the run makes no progress.
const SKIPS: usize = 1000;

impl Machine {
    pub(super) fn form_if_gathered(&mut self, actions: &mut Vec<Action>) {
        if self.stage != Stage::Gathering || self.is_searching() {
            return;
        }
        // Workers that still load are waited for: a group formed without them would regroup at once. A
        // process that lingers may hold the GPU that its replacement needs.
        let loaded = self.workers.values().filter(|w| w.facts.is_some()).count();
        let all_loaded = loaded == self.workers.len() && self.locals.lingering.is_empty();
        // At least one, also for a run that starts no local workers and waits for others.
        if all_loaded && loaded >= (self.expected_locals() as usize).max(1) {
            self.form(Cause::Gathered, actions);
        }
    }

    pub(super) fn ready(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        position: Option<Position>,
        actions: &mut Vec<Action>,
    ) {
        // Invariant 4: a promise about an older generation says nothing about this one (M2).
        if !self.concerns_newest(worker, generation) {
            return;
        }
        self.come_to_rest(worker, position);
        match self.stage {
            Stage::Training { plan: Some(Plan { kind: PlanKind::Regroup, .. }) } => {
                // First member to quiesce for a planned change; the others follow at the same
                // update index.
                self.stage = Stage::Regrouping { until: self.regroup_limit(), cause: Cause::Planned };
            }
            // No change was planned, so a report of a fault must have been lost with a session.
            Stage::Training { .. } => {
                let fault = Fault::Internal("it rests, and its reason was lost on the way".to_string());
                self.regroup(Cause::Fault(worker, fault), actions);
            }
            // While regrouping or closing, a quiesced member is what is waited for.
            _ => {}
        }
        self.form_if_ready(actions);
    }

    pub(super) fn fault(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        fault: Fault,
        actions: &mut Vec<Action>,
    ) {
        if !self.concerns_newest(worker, generation) {
            return;
        }
        match fault {
            Fault::Diverged(detail) => self.diverged(detail, actions),
            // The job asks to stop, or the state cannot recover: another run of the phase would give the
            // same.
            Fault::NonFinite { detail, stop: true, .. } => self.end(Outcome::Failed(detail), actions),
            Fault::NonFinite { position, detail, .. } => self.not_finite(position, detail, actions),
            // It says itself that it cannot go on, which is as good as its end.
            Fault::Internal(detail) => {
                actions.push(Action::Drop(worker));
                self.lost(worker, Loss::Failed(detail), actions);
            }
            Fault::Peer | Fault::Timeout | Fault::Links(_) => {
                // Before the regroup, which chooses members that can reach each other.
                if let Fault::Links(ranks) = &fault {
                    self.sever(worker, ranks);
                }
                let is_reset = fault == Fault::Peer;
                self.regroup(Cause::Fault(worker, fault), actions);
                // The peer's session may have ended before this report: with both, the peer is lost
                // at once.
                if is_reset {
                    self.lose_disconnected(actions);
                }
            }
        }
    }

    /// Keeps members that cannot reach each other out of one group for the length of a lease.
    fn sever(&mut self, worker: WorkerId, ranks: &[Rank]) {
        let until = self.now + self.settings.limits.lease;
        let members: Vec<WorkerId> = self.members().collect();
        for peer in ranks.iter().filter_map(|rank| members.get(rank.0 as usize)) {
            let pair = (worker.min(*peer), worker.max(*peer));
            if pair.0 != pair.1 {
                self.severed.insert(pair, until);
            }
        }
    }

    /// Rolls all members back to the newest checkpoint because their states differ.
    pub(super) fn diverged(&mut self, detail: String, actions: &mut Vec<Action>) {
        if self.condemned == Some(self.last_generation) {
            // Another member has reported it already: a divergence is rolled back once.
            return;
        }
        self.divergences += 1;
        if self.divergences > DIVERGENCES {
            let what = format!(
                "{detail}; {DIVERGENCES} roll-backs did not help: a machine of the run computes wrongly. Leave it out: the same \
                 command then goes on from the newest checkpoint"
            );
            return self.end(Outcome::Failed(what), actions);
        }
        self.roll_back(Cause::Diverged(detail), actions);
    }

    /// Rolls all members back, and allows them to skip the phase if it is not finite again.
    fn not_finite(&mut self, position: Position, detail: String, actions: &mut Vec<Action>) {
        // All members judge the same bytes and report the same: the first report decides. So it comes
        // before the limit, which must not depend on how many report.
        if self.skips.contains(&position) {
            return;
        }
        if self.skips.len() >= SKIPS {
            let what = format!(
                "{detail}; rolled back by {SKIPS} phases already, the run gets nowhere; start a new run with a smaller \
                 optimizer.learning_rate"
            );
            return self.end(Outcome::Failed(what), actions);
        }
        self.skips.insert(position);
        // Journaled before the roll-back: a new coordinator must know why the run went back.
        actions.push(Action::AllowSkip(position));
        self.roll_back(Cause::NonFinite(detail), actions);
    }

    fn roll_back(&mut self, cause: Cause, actions: &mut Vec<Action>) {
        if self.condemned != Some(self.last_generation) {
            self.condemned = Some(self.last_generation);
            self.assembly = Assembly::default();
            actions.push(Action::Condemn(self.last_generation));
            self.regroup(cause, actions);
        }
    }

    /// Breaks the group up, during training or closing.
    pub(super) fn regroup(&mut self, cause: Cause, actions: &mut Vec<Action>) {
        let until = match &self.stage {
            Stage::Training { .. } | Stage::Closing { .. } => self.regroup_limit(),
            // A fault goes before a planned change.
            Stage::Regrouping { until, cause: Cause::Planned } => *until,
            // Already breaking up because of a fault: this report may have been the last one awaited.
            Stage::Regrouping { .. } => return self.form_if_ready(actions),
            Stage::Gathering | Stage::Reconnecting { .. } | Stage::Ended => return,
        };
        self.stage = Stage::Regrouping { until, cause: cause.clone() };
        self.abort(self.present_members(), cause, actions);
        self.form_if_ready(actions);
    }

    fn regroup_limit(&self) -> Time {
        // An order to leave takes time to reach the member, as does its answer; the training thread
        // first finishes its shard gradient.
        self.now + self.patience().max(self.settings.limits.deadline * 2)
    }

    pub(super) fn abort(&self, workers: Vec<WorkerId>, cause: Cause, actions: &mut Vec<Action>) {
        let probe = cause == Cause::Stalled;
        actions.push(Action::Abort { generation: self.last_generation, workers, cause, probe });
    }

    pub(super) fn form_if_ready(&mut self, actions: &mut Vec<Action>) {
        let Stage::Regrouping { cause, .. } = &self.stage else { return };
        // M3: each member is ready, lost, or late by the regroup's limit.
        if self.members().any(|id| self.is_awaited(&id)) {
            return;
        }
        if !self.present_members().is_empty() {
            self.form(cause.clone(), actions);
        } else if self.absent.is_empty() {
            // None is left, and none can be training: the checkpoint is the newest state.
            self.gather(actions);
        } else {
            // One of the members may still train: only its own lease ends that.
            self.stage = Stage::Reconnecting { until: None };
        }
    }

    /// Nobody holds a state any more: starts anew, unless a stop is requested.
    pub(super) fn gather(&mut self, actions: &mut Vec<Action>) {
        self.stage = Stage::Gathering;
        if self.stop_requested {
            self.end_stopped(actions);
        } else if self.condemned == Some(self.last_generation) {
            // What a member of it saved must not be used either (D10).
            self.form_if_gathered(actions);
        } else {
            // Members that were cut off trained on until their leases ended, and saved what they had (M11).
            self.search = Some(Search::Asked);
            actions.push(Action::Search);
        }
    }

    /// Whether a checkpoint may be found that is newer than the newest known one.
    fn is_searching(&self) -> bool {
        match self.search {
            None => false,
            Some(Search::Asked) => true,
            Some(Search::Until(found)) => {
                self.checkpoint.as_ref().is_none_or(|checkpoint| checkpoint.position < found)
            }
        }
    }

    fn form(&mut self, cause: Cause, actions: &mut Vec<Action>) {
        let ids = self.next_members();
        // A group that nobody can save for would lose all its work at its end.
        if !ids.iter().any(|id| self.sees_storage(*id)) {
            return self.wait_for_a_writer(&ids, actions);
        }
        let world_size = u32::try_from(ids.len()).expect("a group is at most V workers");
        let ranges = shard_ranges(self.settings.data_shards, world_size);
        let with_shards = ids.into_iter().zip(ranges);
        let members: Vec<GroupMember> = with_shards
            .map(|(worker, shards)| GroupMember { worker, shards, writes_parts: self.sees_storage(worker) })
            .collect();
        // Before the number is raised: it asks whether the last generation is invalidated.
        let (position, start) = self.choose_start(&members);
        self.last_generation = Generation(self.last_generation.0 + 1);
        let skips = self.skips.iter().copied().collect();
        // For all at once: members that chose for themselves might choose differently.
        let backend = Backend::of(members.iter().map(|member| self.gpu_of(member.worker)));
        self.begin(
            Group { generation: self.last_generation, members, position, start, skips, backend },
            cause,
            actions,
        );
    }

    /// No member of a group formed now could save the state. If a local worker is to come, which
    /// can, the quiesced members hold the state until then.
    fn wait_for_a_writer(&mut self, ids: &[WorkerId], actions: &mut Vec<Action>) {
        if matches!(self.stage, Stage::Regrouping { .. }) && self.is_a_local_to_come() {
            // A leaver that holds nothing the others need does not wait with them.
            self.let_leavers_go(|leaver| ids.contains(&leaver), actions);
            return;
        }
        let outcome = "no worker can write to the checkpoint storage; share its folder with the \
                       workers' machines and name it in checkpoint.url, or give them its credentials: the same command \
                       then goes on from the newest checkpoint";
        self.end(Outcome::Failed(outcome.to_string()), actions);
    }

    fn let_leavers_go(&mut self, is_needed: impl Fn(WorkerId) -> bool, actions: &mut Vec<Action>) {
        let leaving: Vec<WorkerId> = self.workers.keys().copied().filter(|id| self.is_leaving(*id)).collect();
        for worker in leaving.into_iter().filter(|worker| !is_needed(*worker)) {
            self.let_go(worker, actions);
        }
    }

    fn begin(&mut self, group: Group, cause: Cause, actions: &mut Vec<Action>) {
        // The last reports concerned the generation before; a member has to report anew.
        for worker in self.workers.values_mut() {
            worker.rest = Rest::Ready(None);
            worker.finished = None;
        }
        for member in &group.members {
            let entry = self.workers.get_mut(&member.worker).expect("members are present");
            entry.rest = Rest::Busy;
            entry.progress.position = group.position;
            entry.progress_since = self.now;
            // Kept from its first group: it says how long the worker has lasted.
            entry.member_since.get_or_insert(self.now);
        }
        self.group = Some(group.clone());
        self.search = None;
        self.formed_here = true;
        self.job_changed = false;
        // A lost member commits the reduce under way at most: each needs all members (D5), and one has
        // left. If it comes back, it is a stranger (invariant 7).
        self.absent.clear();
        self.stage = Stage::Training { plan: None };
        actions.push(Action::Form(group.clone(), cause));
        // Members that wanted to leave and are no longer needed as a source.
        self.let_leavers_go(|leaver| group.members.iter().any(|member| member.worker == leaver), actions);
    }

    /// Members of a group formed now, oldest first: workers that are loaded and can reach each
    /// other, up to V, and among them one that can save, if there is one. The source of the state
    /// is always a member. Workers that leave are members only if nobody who stays holds the state
    /// at their update index.
    fn next_members(&self) -> Vec<WorkerId> {
        let source = self.source();
        // With a source that stays, leavers are not needed; without one they carry the state on.
        let stays = |id: &WorkerId| !self.is_leaving(*id);
        let advanced = source.and_then(|source| self.rest_position(source));
        let held_by_one_who_stays = source.is_some_and(|source| stays(&source));
        let loaded = self.workers.iter().filter(|(_, worker)| worker.facts.is_some()).map(|(id, _)| *id);
        let anybody_stays = loaded.clone().any(|id| stays(&id));
        let candidates = loaded
            .filter(|id| stays(id) || (!held_by_one_who_stays && (advanced.is_some() || !anybody_stays)));
        let mut chosen: Vec<WorkerId> = source.into_iter().collect();
        let fits = |chosen: &[WorkerId], id: WorkerId| {
            // The oldest come first, so of a pair without a link the newer one waits outside.
            let reaches = |other: &WorkerId| !self.severed.contains_key(&(id.min(*other), id.max(*other)));
            let has_room = chosen.len() < self.settings.data_shards as usize;
            has_room && !chosen.contains(&id) && chosen.iter().all(reaches)
        };
        if !chosen.iter().any(|id| self.sees_storage(*id)) {
            // Some member has to save, however many older ones cannot.
            let writer = candidates.clone().find(|id| self.sees_storage(*id) && fits(&chosen, *id));
            chosen.extend(writer);
        }
        for id in candidates {
            if fits(&chosen, id) {
                chosen.push(id);
            }
        }
        self.rank(&mut chosen);
        chosen
    }

    /// Orders members by their ranks, however they were chosen: by id, but with the workers of one machine
    /// next to each other. Then a machine has whole nodes of the tree by which gradients are summed, and
    /// most of what ranks exchange stays on it.
    fn rank(&self, members: &mut [WorkerId]) {
        members.sort_unstable();
        let host_of = |id: &WorkerId| self.workers.get(id)?.facts.as_ref()?.host.as_deref();
        // Machines in the order of their oldest members.
        let mut oldest = BTreeMap::new();
        for id in &*members {
            if let Some(host) = host_of(id) {
                oldest.entry(host).or_insert(*id);
            }
        }
        members.sort_by_key(|id| (host_of(id).map_or(*id, |host| oldest[host]), *id));
    }

    /// Most advanced quiesced member: one that stays takes precedence over one that leaves, then
    /// the lowest number.
    fn source(&self) -> Option<WorkerId> {
        // No state of an invalidated generation may go on: all read the checkpoint (D10).
        if self.condemned == Some(self.last_generation) {
            return None;
        }
        let rested = self.present_members().into_iter().filter_map(|id| Some((self.rest_position(id)?, id)));
        rested
            .min_by_key(|(position, id)| (std::cmp::Reverse(*position), self.is_leaving(*id), *id))
            .map(|(_, id)| id)
    }

    fn choose_start(&self, members: &[GroupMember]) -> (Position, Start) {
        let rank_of = |is: &dyn Fn(&GroupMember) -> bool| {
            let index = members.iter().position(is).unwrap_or(0);
            Rank(u32::try_from(index).expect("a rank is below V"))
        };
        let best = self.source().and_then(|source| Some((self.rest_position(source)?, source)));
        match (best, &self.checkpoint) {
            (Some((position, source)), checkpoint)
                // Equally far: the held state needs no read from the storage.
                if checkpoint.as_ref().is_none_or(|c| c.position <= position) =>
            {
                (position, Start::Healed(rank_of(&|member| member.worker == source)))
            }
            // Nobody holds a state, or a worker that trained on alone has saved a newer one (M11).
            (_, Some(checkpoint)) => {
                let reader = rank_of(&|member| member.writes_parts);
                (checkpoint.position, Start::Checkpoint(reader, checkpoint.clone()))
            }
            (_, None) => (Position(0), Start::Fresh),
        }
    }

    /// While a group trains: plans the next due change, a stop before any other.
    pub(super) fn plan_ahead(&mut self, actions: &mut Vec<Action>) {
        let Stage::Training { plan } = self.stage else { return };
        let Some(due) = self.due_change() else { return };
        let known = plan.map(|plan| plan.kind);
        // A stop is never taken back for a regroup: its members finish instead (invariant 5).
        if known != Some(due) && known != Some(PlanKind::Stop) {
            self.last_plan += 1;
            let plan = Plan { number: self.last_plan, kind: due };
            self.stage = Stage::Training { plan: Some(plan) };
            actions.push(Action::Announce { plan, workers: self.present_members() });
        }
    }

    fn due_change(&self) -> Option<PlanKind> {
        if self.stop_requested {
            return Some(PlanKind::Stop);
        }
        let members = self.present_members();
        let leaves = members.iter().any(|id| self.is_leaving(*id));
        let stays = members.iter().any(|id| !self.is_leaving(*id));
        let joins = self.joiners(&members);
        match (leaves, stays || joins) {
            // Nobody would hold the state after them: they save it before they go (M7).
            (true, false) => Some(PlanKind::Stop),
            (true, true) => Some(PlanKind::Regroup),
            (false, _) => joins.then_some(PlanKind::Regroup),
        }
    }

    /// Whether a loaded worker would be taken into a new group.
    fn joiners(&self, members: &[WorkerId]) -> bool {
        let staying = members.iter().filter(|id| !self.is_leaving(**id)).count();
        let leavers_only = staying == 0;
        // Beyond V workers a newcomer is a spare, unless all members are about to leave.
        let room = members.len() < self.settings.data_shards as usize || leavers_only;
        // A worker that would be left out again must not break the group up.
        let reaches_all = |id: &WorkerId| {
            members.iter().all(|other| !self.severed.contains_key(&((*id).min(*other), (*id).max(*other))))
        };
        let mut loaded = self.workers.iter().filter(|(_, worker)| worker.facts.is_some() && !worker.leaving);
        // All members are among the workers.
        let others = self.workers.len() > members.len();
        room && others && {
            let members: BTreeSet<WorkerId> = members.iter().copied().collect();
            loaded.any(|(id, _)| !members.contains(id) && reaches_all(id))
        }
    }
}
