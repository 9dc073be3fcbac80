//! Comparison of a package with the machine that shall run it: a function of both, without a look at this
//! machine.

use std::collections::BTreeSet;

use super::{Device, Manifest, PackageError};

/// Properties of a machine that compiled code depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Version of libtorch, such as `2.11.0`.
    pub torch: String,
    /// Architecture of the processor, such as `x86_64`.
    pub arch: String,
    /// Features of the processor, by their names in `/proc/cpuinfo`.
    pub features: BTreeSet<String>,
    /// GPU that is trained on, if it is one.
    pub accelerator: Option<Accelerator>,
}

/// A GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accelerator {
    /// Compute capability, such as `9.0`.
    pub capability: String,
    /// Version of CUDA that libtorch was built with, such as `13.0`.
    pub cuda: String,
}

/// Features of a processor by the text of `/proc/cpuinfo`: those that all of its cores have.
pub fn features(cpuinfo: &str) -> BTreeSet<String> {
    // The first is what x86 calls them, the second what ARM does.
    let lines = cpuinfo.lines().filter_map(|line| line.split_once(':'));
    let lists = lines.filter(|(key, _)| matches!(key.trim(), "flags" | "Features"));
    let sets = lists.map(|(_, list)| list.split_whitespace().map(str::to_owned).collect());
    sets.reduce(|all: BTreeSet<String>, core| &all & &core).unwrap_or_default()
}

/// Version of PyTorch without the name of its build, such as `+cpu`.
fn release(version: &str) -> &str {
    version.split_once('+').map_or(version, |(release, _)| release)
}

impl Manifest {
    /// Checks that compiled code may run on a machine.
    ///
    /// # Errors
    /// Compiled for another version of PyTorch, device or processor; the text says how to export
    /// again.
    pub fn check_machine(&self, machine: &Machine) -> Result<(), PackageError> {
        self.check_torch(machine)?;
        self.check_processor(machine)?;
        self.check_device(machine.accelerator.as_ref())
    }

    fn check_torch(&self, machine: &Machine) -> Result<(), PackageError> {
        let (of, here) = (release(&self.torch), release(&machine.torch));
        if of == here {
            return Ok(());
        }
        Err(PackageError(format!(
            "was exported with PyTorch {of}, and this worker runs PyTorch {here}: export it again with that version \
             (pip install torch=={here}), then ganglion.export(...)"
        )))
    }

    fn check_processor(&self, machine: &Machine) -> Result<(), PackageError> {
        let cpu = &self.cpu;
        if cpu.arch != machine.arch {
            return Err(PackageError(format!(
                "was compiled for {} processors, and this machine has one of {}: export it again on a machine like this \
                 one with ganglion.export(...)",
                cpu.arch, machine.arch
            )));
        }
        let features = cpu.features.iter().map(String::as_str);
        let lacking: Vec<&str> = features.filter(|feature| !machine.features.contains(*feature)).collect();
        if lacking.is_empty() {
            return Ok(());
        }
        Err(PackageError(format!(
            "was compiled for a processor with {}, which this machine's lacks: export it again with ganglion.export(..., \
             cpu=\"x86-64-v3\"), which nearly all processors have, or on this machine",
            lacking.join(", ")
        )))
    }

    fn check_device(&self, accelerator: Option<&Accelerator>) -> Result<(), PackageError> {
        let again = |device: &str| format!("export it again with ganglion.export(..., device=\"{device}\")");
        match (self.device, accelerator) {
            (Device::Cpu, None) => Ok(()),
            (Device::Cpu, Some(_)) => Err(PackageError(format!(
                "was exported for CPUs, and this worker computes on a GPU: {}, or let workers take the CPU (--device cpu)",
                again("cuda")
            ))),
            (Device::Cuda, None) => Err(PackageError(format!(
                "was exported for GPUs, and this worker computes on a CPU: {}, or give the worker a GPU (--device cuda:0)",
                again("cpu")
            ))),
            (Device::Cuda, Some(gpu)) => {
                let pairs = [
                    ("compute capability", &self.capability, &gpu.capability),
                    ("CUDA", &self.cuda, &gpu.cuda),
                ];
                for (what, of, here) in pairs {
                    let of = of.as_deref().unwrap_or("unknown");
                    if of != here {
                        return Err(PackageError(format!(
                            "was exported for {what} {of}, and this worker has {here}: {} on a machine like this one",
                            again("cuda")
                        )));
                    }
                }
                Ok(())
            }
        }
    }
}
