//! Backend of a group's collectives.

/// Backend of the collectives, one for a whole group. It is decided when the group forms: members
/// that chose for themselves might differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    /// Between CPUs. Works everywhere; data on a GPU goes through the CPU's memory.
    #[default]
    Gloo,
    /// Between GPUs. Requires a GPU of its own for each member.
    Nccl,
}

impl Backend {
    /// Returns the backend for members that compute on these GPUs; `None` stands for a member on a
    /// CPU.
    pub fn of<'a>(gpus: impl IntoIterator<Item = Option<&'a str>>) -> Backend {
        let mut seen = Vec::new();
        for gpu in gpus {
            match gpu {
                Some(gpu) if !seen.contains(&gpu) => seen.push(gpu),
                // A member on a CPU cannot take part in NCCL, and NCCL refuses two ranks on one GPU.
                _ => return Backend::Gloo,
            }
        }
        if seen.is_empty() { Backend::Gloo } else { Backend::Nccl }
    }
}

impl std::fmt::Display for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Backend::Gloo => "Gloo",
            Backend::Nccl => "NCCL",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nccl_serves_where_each_member_has_a_gpu_of_its_own() {
        let of = |gpus: &[&str]| Backend::of(gpus.iter().map(|gpu| Some(*gpu).filter(|gpu| !gpu.is_empty())));
        assert_eq!(of(&["a/0"]), Backend::Nccl);
        assert_eq!(of(&["a/0", "a/1", "b/0", "b/1"]), Backend::Nccl);
        assert_eq!(of(&["a/0", "a/1", "a/0"]), Backend::Gloo, "two share one");
        assert_eq!(of(&["a/0", ""]), Backend::Gloo, "one computes on a CPU");
        assert_eq!(of(&["", ""]), Backend::Gloo);
        assert_eq!(of(&[]), Backend::Gloo);
    }
}
