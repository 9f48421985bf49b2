//! The cores of a machine that several ranks run on.

use std::thread::available_parallelism;

use rayon::ThreadPoolBuilder;

use super::Ranks;

/// Names a machine since it was started, also from within a container, and the cores that this process may run on.
const PLACES: [(&str, &str); 2] = [("/proc/sys/kernel/random/boot_id", ""), ("/proc/self/status", "Cpus_allowed:")];

/// Gives this process's pool of threads an equal share of the cores, where other ranks run on the same ones. Where each is bound to
/// cores of its own, the pool has as many threads as these. To be called before the first use of the pool.
pub fn share_cores(ranks: &dyn Ranks) {
    let place: String = PLACES.iter().flat_map(|(path, start)| line(path, start)).collect();
    let sharing = ranks.gather(place.as_bytes()).iter().filter(|other| other[..] == *place.as_bytes()).count();
    if sharing > 1 {
        let threads = available_parallelism().map_or(1, |cores| (cores.get() / sharing).max(1));
        // Refused only where there is a pool already, which then is as large as it is.
        let _ = ThreadPoolBuilder::new().num_threads(threads).build_global();
    }
}

/// The first line of a file that starts so; none where there is no such file.
fn line(path: &str, start: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    text.lines().find(|line| line.starts_with(start)).map(str::to_owned)
}
