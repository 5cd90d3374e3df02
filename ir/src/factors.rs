//! The two factors of a width that a Kronecker pair has.

/// The factors of `n` that Fermat's method finds: `(a - b, a + b)` for the smallest `a` of which `a² - n` is a square `b²`.
/// They are the pair nearest to each other among those that are both even or both odd. `None` where there is no such
/// pair: for 0, and for twice an odd number.
pub fn fermat(n: u64) -> Option<(u64, u64)> {
    if n % 4 == 2 {
        return None;
    }
    let fits = |left: &u64| n.is_multiple_of(*left) && (n / left) % 2 == left % 2;
    (1..=n.isqrt()).rev().find(fits).map(|left| (left, n / left))
}

#[cfg(test)]
mod tests {
    use super::*;

    // methods.md §7.3 [golden], ascend.md §5.3.
    #[test]
    fn factors_golden() {
        for (n, want) in [
            (896, (28, 32)),
            (1536, (32, 48)),
            (3584, (56, 64)),
            (4096, (64, 64)),
            (5120, (64, 80)),
            (8192, (64, 128)),
            (4864, (64, 76)),
            (8960, (80, 112)),
            (2240, (40, 56)),
            (11008, (86, 128)),
            (14336, (112, 128)),
            (18944, (128, 148)),
            (2368, (32, 74)),
            (13824, (108, 128)),
            (27648, (144, 192)),
            (28672, (128, 224)),
            (576, (24, 24)),
            (4, (2, 2)),
            (7, (1, 7)),
            (1, (1, 1)),
        ] {
            assert_eq!(fermat(n), Some(want), "{n}");
        }
    }

    #[test]
    fn the_method_itself_finds_the_same() {
        for n in 0..2000u64 {
            let least = (0..=n).find(|a| a * a >= n).unwrap_or(0);
            // The last pair is 1 and n, for which a is (n + 1) / 2.
            let found = (least..=n.div_ceil(2) + 1).find_map(|a| {
                let b = (a * a - n).isqrt();
                (a > b && b * b == a * a - n).then_some((a - b, a + b))
            });
            assert_eq!(fermat(n), found, "{n}");
        }
        for n in [2, 66, 4098, u64::MAX - 1] {
            assert_eq!(fermat(n), None, "{n}");
        }
    }
}
