//! Private memory of this process, watched while a command runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Allocations of this many bytes and more go back to the system when they are freed.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const OWN_PAGES: i32 = 1 << 20;

/// Keeps freed memory from staying with the process. glibc's heaps keep the holes that large buffers of changing sizes
/// leave, for each thread; that can be as much again as is in use.
pub(crate) fn give_back_early() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        #[expect(unsafe_code, reason = "a setting of the C library, which Rust's allocator uses")]
        // SAFETY: `mallopt` takes two numbers; no other thread runs yet. If it refuses, nothing changes.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_PAGES);
        }
    }
}

/// How often memory is looked at.
const INTERVAL: Duration = Duration::from_millis(10);

/// Private resident bytes now: mapped files do not count. 0 where the system does not say.
pub(crate) fn private_bytes() -> u64 {
    resident("RssAnon:")
}

/// Bytes of mapped files that are in memory now. 0 where the system does not say.
pub(crate) fn mapped_bytes() -> u64 {
    resident("RssFile:")
}

/// Bytes that processes may still take without swapping, if the system says so.
pub(crate) fn available_bytes() -> Option<u64> {
    from_table("/proc/meminfo", "MemAvailable:")
}

/// Bytes that a command may fill with what it can also do without: what is available but for an eighth, or a gigabyte where
/// the system does not say.
pub(crate) fn free_bytes() -> u64 {
    available_bytes().map_or(1 << 30, |n| n / 8 * 7)
}

fn resident(key: &str) -> u64 {
    from_table("/proc/self/status", key).unwrap_or(0)
}

/// A line such as `RssAnon:  12 kB`, in bytes.
fn from_table(path: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find(|l| l.starts_with(key))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// Keeps the largest private size seen.
pub(crate) struct Watch {
    peak: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Watch {
    pub(crate) fn start() -> Self {
        let (peak, stop) = (Arc::new(AtomicU64::new(private_bytes())), Arc::new(AtomicBool::new(false)));
        let (p, s) = (peak.clone(), stop.clone());
        // Without a thread there is no watching; the command runs all the same.
        let _ = std::thread::Builder::new().name("memory".into()).spawn(move || {
            while !s.load(Ordering::Relaxed) {
                p.fetch_max(private_bytes(), Ordering::Relaxed);
                std::thread::sleep(INTERVAL);
            }
        });
        Watch { peak, stop }
    }

    pub(crate) fn peak(&self) -> u64 {
        self.peak.fetch_max(private_bytes(), Ordering::Relaxed).max(private_bytes())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// `1.5 GB`, `340 MB`
pub(crate) fn show_bytes(n: u64) -> String {
    let x = n as f64;
    if x >= 1e9 {
        format!("{:.2} GB", x / 1e9)
    } else if x >= 1e6 {
        format!("{:.1} MB", x / 1e6)
    } else {
        format!("{:.1} kB", x / 1e3)
    }
}

/// `8G`, `512MiB`, `1.5GB`, `2000000`
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "t" | "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024f64.powi(2),
        "gib" => 1024f64.powi(3),
        _ => return Err(format!("`{text}` is no size; write 8G, 512MiB or a number of bytes")),
    };
    match number.parse::<f64>() {
        Ok(x) if x > 0.0 && x.is_finite() => Ok((x * factor) as u64),
        _ => Err(format!("`{text}` is no size; write 8G, 512MiB or a number of bytes")),
    }
}
