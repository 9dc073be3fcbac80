//! Sampler of the GPU's use, on a thread of its own: the driver may take its time, and training does not
//! wait for it.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ganglion_proto::message::GpuUse;
use nvml_wrapper::Nvml;

/// Interval between two samples.
const PERIOD: Duration = Duration::from_secs(1);

/// Newest figures of a GPU, sampled in the background until this is dropped.
#[derive(Debug)]
pub struct GpuWatch {
    newest: Arc<Mutex<GpuUse>>,
    /// Dropping it ends the thread.
    _stop: Sender<()>,
}

impl GpuWatch {
    /// Watches the GPU at an address of the PCI bus. Without the driver's library the figures stay unknown.
    pub fn start(place: &str) -> std::io::Result<GpuWatch> {
        let place = place.to_string();
        let mut driver = None;
        GpuWatch::with(PERIOD, move || {
            // Loaded on the thread, since that takes a while.
            let driver = driver.get_or_insert_with(|| {
                Nvml::init().map_err(|error| tracing::debug!("no figures of the GPU: {error}"))
            });
            driver.as_ref().map(|driver| look(driver, &place)).unwrap_or_default()
        })
    }

    /// The same with another function to sample.
    fn with(
        period: Duration,
        mut look: impl FnMut() -> GpuUse + Send + 'static,
    ) -> std::io::Result<GpuWatch> {
        let newest = Arc::new(Mutex::new(GpuUse::default()));
        let (stop, stopped) = channel();
        let theirs = newest.clone();
        std::thread::Builder::new().name("gpu".to_string()).spawn(move || {
            loop {
                let seen = look();
                // Held for the copy alone, after the driver has answered.
                *theirs.lock().unwrap_or_else(PoisonError::into_inner) = seen;
                // Wakes at once when the watch is dropped, which closes the channel.
                if stopped.recv_timeout(period) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        })?;
        Ok(GpuWatch { newest, _stop: stop })
    }

    /// Returns the newest figures. Never waits for the driver.
    pub fn newest(&self) -> GpuUse {
        // At most as long as a copy, as the thread asks the driver without it.
        *self.newest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Model name of a GPU.
pub(crate) fn model(place: &str) -> Option<String> {
    Nvml::init().ok()?.device_by_pci_bus_id(place).ok()?.name().ok()
}

/// Takes one sample. Figures that the driver does not give, such as the use of a part of a GPU, stay
/// unknown.
fn look(driver: &Nvml, place: &str) -> GpuUse {
    let Ok(gpu) = driver.device_by_pci_bus_id(place) else { return GpuUse::default() };
    GpuUse {
        memory_bytes: gpu.memory_info().ok().map(|memory| memory.used),
        utilisation: gpu.utilization_rates().ok().map(|rates| rates.gpu),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use super::*;

    #[test]
    fn the_newest_figures_are_at_hand_and_the_thread_ends_with_its_owner() {
        let (looks, looked) = sync_channel(0);
        let mut count = 0;
        let watch = GpuWatch::with(Duration::from_millis(1), move || {
            count += 1;
            let seen = GpuUse { memory_bytes: Some(count), utilisation: None };
            // The end of the test's side ends the wait too.
            let _ = looks.send(());
            seen
        });
        let watch = watch.unwrap();
        assert_eq!(watch.newest(), GpuUse::default(), "nothing was seen yet");
        looked.recv().unwrap();
        // A look begins after the one before was noted.
        looked.recv().unwrap();
        let seen = watch.newest().memory_bytes;
        assert!(seen == Some(1) || seen == Some(2), "{seen:?}");
        drop(watch);
        while looked.recv().is_ok() {}
    }

    #[test]
    fn a_gpu_that_is_not_there_has_no_figures() {
        if let Ok(driver) = Nvml::init() {
            assert_eq!(look(&driver, "ffff:ff:1f.0"), GpuUse::default());
        }
        assert_eq!(GpuWatch::start("ffff:ff:1f.0").unwrap().newest(), GpuUse::default());
    }
}
