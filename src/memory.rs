//! Private memory of this process, watched while a command runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// How often memory is looked at.
const INTERVAL: Duration = Duration::from_millis(10);

/// Private resident bytes now: mapped files do not count. 0 where the system does not say.
pub(crate) fn private_bytes() -> u64 {
    let Ok(text) = std::fs::read_to_string("/proc/self/status") else { return 0 };
    let kib = |key: &str| {
        let line = text.lines().find(|l| l.starts_with(key))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    };
    kib("RssAnon:").unwrap_or(0) * 1024
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
