//! Choice of the compute device.

pub(crate) mod gpu;

use std::ffi::OsString;
use std::str::FromStr;

use ganglion_proto::job::Tf32;
use ganglion_proto::package::Accelerator;
use ganglion_proto::words::counted;
use tch::{Cuda, Device};

use crate::data::Upload;

/// Device as given on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The GPU of this process's local rank if there is one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU, by its index on this machine.
    Cuda(usize),
}

/// Properties of a GPU that compiled code depends on; `None` for the CPU.
///
/// # Errors
/// There is no such GPU.
pub(crate) fn accelerator(device: Device) -> Result<Option<Accelerator>, c10d::Error> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(index) => Ok(Some(Accelerator {
            capability: c10d::cuda::compute_capability(index)?,
            cuda: c10d::cuda::version()?,
        })),
        _ => Ok(None),
    }
}

/// Facts that the bits of a GPU depend on, for the fingerprint of the environment: kernels divide their work
/// by its multiprocessors, and libraries choose kernels by its kind, their own version and their settings.
/// Nothing for the CPU.
///
/// # Errors
/// There is no such GPU.
pub(crate) fn gpu_facts(device: Device) -> Result<Vec<(&'static str, String)>, c10d::Error> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(index) => Ok(vec![
            ("gpu", c10d::cuda::name(index)?),
            ("gpu_capability", c10d::cuda::compute_capability(index)?),
            ("gpu_libraries", format!("CUDA {}, {}", c10d::cuda::version()?, c10d::cuda::libraries()?)),
            ("gpu_settings", settings(std::env::vars_os())),
        ]),
        _ => Ok(Vec::new()),
    }
}

/// Lets a GPU compute in TF32 what a job says; CPUs compute in fp32.
///
/// # Errors
/// None in practice.
pub(crate) fn set_tf32(device: Device, tf32: Tf32) -> Result<(), c10d::Error> {
    if !device.is_cuda() {
        return Ok(());
    }
    c10d::aten::set_tf32(tf32 != Tf32::Off, tf32 == Tf32::All)
}

/// Waits until a GPU has computed all that was launched; returns at once for the CPU.
///
/// # Errors
/// Some of it failed.
pub(crate) fn wait(device: Device) -> Result<(), c10d::Error> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(index) => c10d::cuda::wait(index),
        _ => Ok(()),
    }
}

/// Makes sure that a GPU had memory for all that this process asked for: without it libtorch takes other
/// kernels, whose bits may differ.
///
/// # Errors
/// Too little memory.
pub(crate) fn check_memory(device: Device) -> Result<(), c10d::Error> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(index) if c10d::cuda::refused_allocations(index)? > 0 => {
            let advice = "free some of it, or lower job.shard_batch";
            Err(c10d::Error::Fatal(format!("GPU {index} had too little memory left; {advice}")))
        }
        _ => Ok(()),
    }
}

/// A place in the work of a GPU.
#[cfg(feature = "cuda")]
pub(crate) type Mark = c10d::cuda::Mark;

/// A place in the work of a GPU. A worker without the feature `cuda` makes none.
#[cfg(not(feature = "cuda"))]
pub(crate) enum Mark {}

#[cfg(not(feature = "cuda"))]
impl Mark {
    /// Waits until the GPU has done all before it.
    ///
    /// # Errors
    /// Some of it failed.
    pub(crate) fn wait(&self) -> Result<(), c10d::Error> {
        match *self {}
    }
}

/// Marks the end of what was launched on a GPU so far; `None` for the CPU, where it is done.
///
/// # Errors
/// Some of it failed.
pub(crate) fn mark(device: Device) -> Result<Option<Mark>, c10d::Error> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(index) => Mark::here(index).map(Some),
        _ => Ok(None),
    }
}

/// Variables that steer the arithmetic of a GPU's libraries, in order: `NAME=VALUE, ...`.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
fn settings(variables: impl Iterator<Item = (OsString, OsString)>) -> String {
    let steers = |name: &str| {
        let starts = ["CUBLAS", "CUDNN", "NVIDIA_TF32", "TORCH_ALLOW_TF32", "TORCH_CUDNN", "TORCH_BLAS"];
        starts.iter().any(|start| name.starts_with(start)) && !name.contains("LOG")
    };
    let shown = variables.map(|(name, value)| (name.to_string_lossy().into_owned(), value));
    let steering = shown.filter(|(name, _)| steers(name));
    let mut steering: Vec<String> =
        steering.map(|(name, value)| format!("{name}={}", value.to_string_lossy())).collect();
    steering.sort_unstable();
    steering.join(", ")
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let index = |text: &str| text.strip_prefix("cuda:").and_then(|index| index.parse().ok());
        match text {
            "auto" => Ok(DeviceChoice::Auto),
            "cpu" => Ok(DeviceChoice::Cpu),
            "cuda" => Ok(DeviceChoice::Cuda(0)),
            _ => index(text)
                .map(DeviceChoice::Cuda)
                .ok_or_else(|| "a device is auto, cpu or cuda:N, such as cuda:0".to_string()),
        }
    }
}

impl DeviceChoice {
    /// Returns the device, if this machine and this build have it.
    pub fn resolve(self) -> Result<Device, String> {
        self.among(gpus(), |name| std::env::var(name).ok())
    }

    /// Returns the device on a machine with `gpus` GPUs, with these variables in the environment.
    fn among(self, gpus: usize, variable: impl Fn(&str) -> Option<String>) -> Result<Device, String> {
        match self {
            DeviceChoice::Cpu => Ok(Device::Cpu),
            DeviceChoice::Auto if gpus == 0 => Ok(Device::Cpu),
            // More processes than GPUs share them in turn, each as evenly as possible.
            DeviceChoice::Auto => Ok(Device::Cuda(local_rank(variable)? % gpus)),
            DeviceChoice::Cuda(index) if index < gpus => Ok(Device::Cuda(index)),
            DeviceChoice::Cuda(_) if !cfg!(feature = "cuda") => {
                Err("--device cuda: this worker is built without the feature cuda".to_string())
            }
            DeviceChoice::Cuda(index) => {
                Err(format!("--device cuda:{index}: this machine has {}", counted(gpus, "CUDA device")))
            }
        }
    }
}

/// Number of GPUs that this process can use. `CUDA_VISIBLE_DEVICES` hides others.
pub fn gpus() -> usize {
    // Without the feature libtorch_cuda is not linked, and tch would find no GPU.
    if cfg!(feature = "cuda") { usize::try_from(Cuda::device_count()).unwrap_or(0) } else { 0 }
}

/// Local rank of this process, as launchers give it. With more processes than GPUs they share evenly.
fn local_rank(variable: impl Fn(&str) -> Option<String>) -> Result<usize, String> {
    // In this order: torchrun's name, which the coordinator uses as well, then Slurm's.
    let given = ["LOCAL_RANK", "SLURM_LOCALID"].into_iter().find_map(|name| Some((name, variable(name)?)));
    let Some((name, value)) = given else { return Ok(0) };
    let wrong = |_| format!("{name}={value}: not a number; it says which GPU to use, so mend it or unset it");
    value.parse().map_err(wrong)
}

/// Function that copies samples to a GPU while training uses the batch before; `None` for a CPU.
pub fn upload(device: Device) -> Option<Upload> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(index) => Some(Box::new(move |pixels| c10d::cuda::upload(pixels, index))),
        _ => None,
    }
}

/// Address of a GPU on the PCI bus; `None` for a CPU.
pub fn place(device: Device) -> Result<Option<String>, c10d::Error> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(index) => c10d::cuda::pci_bus_id(index).map(Some),
        _ => Ok(None),
    }
}

/// Description of a device, diagnostic only: `cuda:0 NVIDIA H100 80GB HBM3`, or `cpu` with the processor's
/// name, where these are known.
pub fn describe(device: Device) -> String {
    let (kind, name) = match device {
        Device::Cuda(index) => {
            (format!("cuda:{index}"), place(device).ok().flatten().and_then(|place| gpu::model(&place)))
        }
        _ => ("cpu".to_string(), processor()),
    };
    name.map_or(kind.clone(), |name| format!("{kind} {name}"))
}

fn processor() -> Option<String> {
    // Diagnostic only; the fingerprint of the environment has its own facts about the processor.
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    line.split_once(": ").map(|(_, name)| name.trim().to_string())
}

/// Name of the GPU at a PCI address of this machine, the same in all processes and containers on it, and on
/// no other machine. NCCL tells GPUs apart by the same two facts.
pub fn name(place: &str) -> String {
    format!("{}/{place}", machine().unwrap_or_default())
}

/// Variable that keeps a worker's messages out of memory shared with others, if it is `off`. Any other text
/// names a part of the machine, and workers share memory with those of the same part.
const SHARED_MEMORY: &str = "GANGLION_SHARED_MEMORY";

/// Whether this worker may share memory with others.
pub(crate) fn shares_memory() -> bool {
    std::env::var_os(SHARED_MEMORY).is_none_or(|part| part != "off")
}

/// Name of the machine, or of the part of it, whose workers have neighbouring ranks; `None` if it has none.
pub(crate) fn host() -> Option<String> {
    let part = std::env::var(SHARED_MEMORY).ok().filter(|part| !part.is_empty() && part != "off");
    Some(part.iter().fold(machine()?, |machine, part| format!("{machine}/{part}")))
}

/// Name of this machine, the same in all containers on it, and on no other machine; `None` if it has none.
pub fn machine() -> Option<String> {
    // Two containers of one machine have the same, and no two machines do. A host's name is only nearly
    // as good.
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok();
    let name = boot.map(|id| id.trim().to_string());
    name.or_else(|| nix::unistd::gethostname().ok()?.into_string().ok()).filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_steers_a_gpus_arithmetic_is_told() {
        let variables = [
            ("NVIDIA_TF32_OVERRIDE", "0"),
            ("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
            ("CUDNN_LOGLEVEL_DBG", "3"),
            ("HOME", "/root"),
        ];
        let told = settings(variables.into_iter().map(|(name, value)| (name.into(), value.into())));
        assert_eq!(told, "CUBLAS_WORKSPACE_CONFIG=:4096:8, NVIDIA_TF32_OVERRIDE=0");
    }

    #[test]
    fn devices_are_read_and_others_refused() {
        assert_eq!("auto".parse(), Ok(DeviceChoice::Auto));
        assert_eq!("cpu".parse(), Ok(DeviceChoice::Cpu));
        assert_eq!("cuda:3".parse(), Ok(DeviceChoice::Cuda(3)));
        for wrong in ["gpu", "cuda:", "cuda:x", ""] {
            assert!(wrong.parse::<DeviceChoice>().is_err(), "{wrong}");
        }
    }

    fn auto(gpus: usize, variables: &[(&str, &str)]) -> Result<Device, String> {
        let variable = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| value.to_string())
        };
        DeviceChoice::Auto.among(gpus, variable)
    }

    #[test]
    fn local_ranks_are_spread_over_the_gpus() {
        let of = |rank: usize, gpus| auto(gpus, &[("LOCAL_RANK", &rank.to_string()), ("SLURM_LOCALID", "9")]);
        assert_eq!([0, 1, 2, 3].map(|rank| of(rank, 4).unwrap()), [0, 1, 2, 3].map(Device::Cuda));
        let mut workers = [0; 3];
        for rank in 0..6 {
            let Device::Cuda(index) = of(rank, 3).unwrap() else { panic!("a GPU") };
            workers[index] += 1;
        }
        assert_eq!(workers, [2; 3]);
        assert_eq!(auto(4, &[("SLURM_LOCALID", "3")]), Ok(Device::Cuda(3)));
        assert_eq!(auto(4, &[]), Ok(Device::Cuda(0)));
        assert_eq!(of(5, 0), Ok(Device::Cpu));
    }

    #[test]
    fn a_local_rank_that_is_no_number_is_refused_where_it_decides() {
        let wrong = auto(2, &[("LOCAL_RANK", "one")]).unwrap_err();
        assert!(wrong.contains("LOCAL_RANK=one"), "{wrong}");
        assert_eq!(auto(0, &[("LOCAL_RANK", "one")]), Ok(Device::Cpu));
    }

    #[test]
    fn a_device_says_what_it_is() {
        assert!(describe(Device::Cpu).starts_with("cpu"), "{}", describe(Device::Cpu));
        assert!(describe(Device::Cuda(3)).starts_with("cuda:3"), "{}", describe(Device::Cuda(3)));
    }

    #[test]
    fn a_gpu_has_one_name_on_its_machine() {
        assert_eq!(name("0000:17:00.0"), name("0000:17:00.0"));
        assert_ne!(name("0000:17:00.0"), name("0000:18:00.0"));
        assert!(!name("").starts_with('/'), "a machine has a name");
        assert_eq!(place(Device::Cpu), Ok(None));
    }
}
