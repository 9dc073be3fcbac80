//! Choosing where to compute.

use std::str::FromStr;

use tch::{Cuda, Device};

/// What the command line asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The GPU of this process's local rank if there is one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU, by its index on this machine.
    Cuda(usize),
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
    /// The device, if this machine and this build have it.
    pub fn resolve(self) -> Result<Device, String> {
        let gpus =
            if cfg!(feature = "cuda") { usize::try_from(Cuda::device_count()).unwrap_or(0) } else { 0 };
        match self {
            DeviceChoice::Cpu => Ok(Device::Cpu),
            DeviceChoice::Auto if gpus == 0 => Ok(Device::Cpu),
            DeviceChoice::Auto => Ok(Device::Cuda(local_rank() % gpus)),
            DeviceChoice::Cuda(index) if index < gpus => Ok(Device::Cuda(index)),
            DeviceChoice::Cuda(_) if !cfg!(feature = "cuda") => {
                Err("--device cuda: this worker is built without the feature cuda".to_string())
            }
            DeviceChoice::Cuda(index) => {
                Err(format!("--device cuda:{index}: this machine has {gpus} CUDA devices"))
            }
        }
    }
}

/// This process's number on its machine, as launchers give it.
fn local_rank() -> usize {
    let variable = |name| std::env::var(name).ok().and_then(|value| value.parse().ok());
    ["LOCAL_RANK", "SLURM_LOCALID"].into_iter().find_map(variable).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_and_others_refused() {
        assert_eq!("auto".parse(), Ok(DeviceChoice::Auto));
        assert_eq!("cpu".parse(), Ok(DeviceChoice::Cpu));
        assert_eq!("cuda:3".parse(), Ok(DeviceChoice::Cuda(3)));
        for wrong in ["gpu", "cuda:", "cuda:x", ""] {
            assert!(wrong.parse::<DeviceChoice>().is_err(), "{wrong}");
        }
    }
}
