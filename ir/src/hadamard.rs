//! Hadamard matrices of the orders that models need, constructed (methods.md §7.1).
//!
//! The transform of size `n = K * p`, `p` a power of two, is `y = x (coreᵀ ⊗ W_p) / sqrt(n)`: a row is read as
//! `[K, p]`, the Walsh-Hadamard matrix in natural order acts on the last axis, the core matrix of order `K` from the
//! left on the first.

/// Core orders in the order in which the published code tries them: the first that divides is taken.
const PUBLISHED: [u64; 11] = [172, 156, 140, 108, 60, 52, 36, 28, 40, 20, 12];

/// Largest core order that is built.
const MAX_CORE: u64 = 2048;

/// Rows of the four circulants of Williamson's array, for orders that neither of Paley's constructions gives.
const WILLIAMSON: [(u64, [&str; 4]); 3] = [
    (52, ["+-+--++++--+-", "+---++++++---", "++-+--++--+-+", "+----+--+----"]),
    (
        156,
        [
            "+++--+-+-----+--++----++--+-----+-+--++",
            "++++---+--++----+-+--+-+----++--+---+++",
            "+++--++-+---+-+--+----+--+-+---+-++--++",
            "+---++-+-+-----+++-++-+++-----+-+-++---",
        ],
    ),
    (
        172,
        [
            "+---++--++++-+-+++-++--++-+++-+-++++--++---",
            "++-++++++----+-+--++-++-++--+-+----++++++-+",
            "+++-+-++--+-+-++++-+----+-++++-+-+--++-+-++",
            "++---++++-+--+--++--------++--+--+-++++---+",
        ],
    ),
];

/// The order of the core matrix of the transform of size `n`: 1 for a power of two; `None` if there is none.
///
/// The published choice where there is one, else the least core that can be built.
pub fn core_order(n: u64) -> Option<u64> {
    if n == 0 {
        return None;
    }
    if n.is_power_of_two() {
        return Some(1);
    }
    let first = PUBLISHED.into_iter().find(|k| n.is_multiple_of(*k));
    if let Some(k) = first.filter(|k| (n / k).is_power_of_two()) {
        return Some(k);
    }
    let odd = n >> n.trailing_zeros();
    let mut k = odd.checked_mul(4)?;
    while k <= MAX_CORE && n.is_multiple_of(k) {
        if constructible(k) {
            return Some(k);
        }
        k *= 2;
    }
    None
}

fn constructible(k: u64) -> bool {
    WILLIAMSON.iter().any(|(n, _)| *n == k) || paley_one(k) || paley_two(k) || k == 40
}

fn paley_one(k: u64) -> bool {
    k.is_multiple_of(4) && is_prime(k - 1)
}

fn paley_two(k: u64) -> bool {
    k.is_multiple_of(4) && k / 2 > 1 && is_prime(k / 2 - 1) && (k / 2 - 1) % 4 == 1
}

fn is_prime(n: u64) -> bool {
    n > 1 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d))
}

/// A Kronecker factor of a Hadamard matrix.
#[derive(Clone, PartialEq, Debug)]
pub struct Factor {
    /// Rows and columns.
    pub size: u64,
    /// Elements that a row steps over, as in [`crate::Op::ModeMul`].
    pub inner: u64,
    /// Entries ±1, row-major, as the mode product takes them.
    pub entries: Vec<i8>,
}

/// The mode products that make up the transform of `block` channels, or its inverse, but for the norm: factors of up to 16 of
/// the Walsh-Hadamard matrix, which is a Kronecker power, then the core. `None` if no matrix of this order can be built.
pub fn factors(block: u64, inverse: bool) -> Option<Vec<Factor>> {
    let k = core_order(block)?;
    let core = core(k)?;
    let mut out = Vec::new();
    let mut inner = 1;
    while inner < block / k {
        let size = (block / k / inner).min(16);
        let sign = |i: u64, j: u64| if (i & j).count_ones().is_multiple_of(2) { 1 } else { -1 };
        let entries = (0..size * size).map(|at| sign(at / size, at % size)).collect();
        out.push(Factor { size, inner, entries });
        inner *= size;
    }
    if k > 1 {
        // The forward transform multiplies columns by the core, which is a mode product with its transpose.
        let n = k as usize;
        let entries = (0..n * n).map(|p| if inverse { core[p] } else { core[p % n * n + p / n] }).collect();
        out.push(Factor { size: k, inner: block / k, entries });
    }
    Some(out)
}

/// The core matrix of order `k`, row-major, entries ±1: `None` if it cannot be built.
pub fn core(k: u64) -> Option<Vec<i8>> {
    if k == 1 {
        return Some(vec![1]);
    }
    if k > MAX_CORE || !constructible(k) {
        return None;
    }
    let n = k as usize;
    if k == 40 {
        let h = core(20)?;
        return Some(square(n, |i, j| if i >= 20 && j >= 20 { -1 } else { 1 } * h[i % 20 * 20 + j % 20]));
    }
    if let Some((_, rows)) = WILLIAMSON.iter().find(|(n, _)| *n == k) {
        return Some(williamson(n, rows));
    }
    if paley_one(k) {
        let chi = characters(n - 1);
        return Some(square(n, |i, j| match (i, j) {
            (_, 0) => 1,
            (0, _) => -1,
            _ if i == j => 1,
            _ => -chi[(j + n - 1 - i) % (n - 1)],
        }));
    }
    // Paley's second construction: a symmetric conference matrix C gives [[C + I, C - I], [C - I, -C - I]].
    let half = n / 2;
    let chi = characters(half - 1);
    Some(square(n, |i, j| {
        let (r, c) = (i % half, j % half);
        let conference = match (r, c) {
            (0, 0) => 0,
            (0, _) | (_, 0) => 1,
            _ => chi[(c + half - 1 - r) % (half - 1)],
        };
        let one = i8::from(r == c);
        match (i < half, j < half) {
            (true, true) => conference + one,
            (false, false) => -conference - one,
            _ => conference - one,
        }
    }))
}

fn square(n: usize, f: impl Fn(usize, usize) -> i8) -> Vec<i8> {
    (0..n * n).map(|at| f(at / n, at % n)).collect()
}

/// The quadratic character modulo a prime: 0 at 0, 1 at squares, -1 elsewhere.
fn characters(q: usize) -> Vec<i8> {
    let mut chi = vec![-1; q];
    (1..q).for_each(|x| chi[x * x % q] = 1);
    chi[0] = 0;
    chi
}

/// `[[A, B, C, D], [-B, A, -D, C], [-C, D, A, -B], [-D, -C, B, A]]` of circulants.
fn williamson(n: usize, rows: &[&str; 4]) -> Vec<i8> {
    const PLACES: [[(usize, i8); 4]; 4] = [
        [(0, 1), (1, 1), (2, 1), (3, 1)],
        [(1, -1), (0, 1), (3, -1), (2, 1)],
        [(2, -1), (3, 1), (0, 1), (1, -1)],
        [(3, -1), (2, -1), (1, 1), (0, 1)],
    ];
    let m = n / 4;
    square(n, |i, j| {
        let (which, sign) = PLACES[i / m][j / m];
        let plus = rows[which].as_bytes()[(j % m + m - i % m) % m] == b'+';
        if plus { sign } else { -sign }
    })
}

/// Numbers near `n` that have a transform, for hints.
pub fn near(n: u64) -> Vec<u64> {
    let mut all: Vec<u64> = (1..=n).rev().filter(|m| core_order(*m).is_some()).take(2).collect();
    all.extend((n + 1..n.saturating_add(256)).find(|m| core_order(*m).is_some()));
    all
}

#[cfg(test)]
mod tests {
    use sha2::Digest;

    use super::*;

    fn orthogonal(h: &[i8], n: usize) -> bool {
        (0..n).all(|i| {
            (0..n).all(|j| {
                let dot: i64 = (0..n).map(|k| i64::from(h[i * n + k]) * i64::from(h[j * n + k])).sum();
                dot == if i == j { n as i64 } else { 0 }
            })
        })
    }

    // methods.md §7.1 [golden]: SHA-256 of the row-major entries, '1' for +1 and '0' for -1.
    #[test]
    fn cores_are_the_published_ones() {
        for (k, want) in [
            (12, "32808f48d141ddb144038496ea3e702e2c081395f7b8463df8d43072e6a755f8"),
            (20, "111767ae6d82a326f422cd06ca7f6840459465d3e2d03b617eb049b7e6bdd2e7"),
            (28, "8a1fc1451ba66fe3d7d888af723b7bffc6aaea0c142f28fad1ea3955058594ae"),
            (36, "6348b60444f67d8633e77efa096636f0208b88c8eaedb2e9b60e0b2d2d7e4ea5"),
            (40, "31d01d8968a35c91934db59f2e3fe8b04327e9839931e33d685a84d2760a2617"),
            (52, "4a7e63f837076439fea3f420958c0bf99e2a9dd4047fa62c4032c769d24b8157"),
            (60, "fa7ea987d59c92094184134466213c5871a0188e4363dc2c973fb53b65ee74e0"),
            (108, "9d551573f91ec273b4fe6bffd2699ae38f02871f1ec09b487f8496e11262c9b3"),
            (140, "b5d7685692aa642cddcea70f6cc4a7b186622c2a43d971561024f096b72d7ac1"),
            (156, "76bd51db75e226ae2d572eb42133b49e4c5f6cdb69fb310c59ed03169b312805"),
            (172, "8b8f8fa7ee35fc877cf99ed119cce256720dbe862e3f7eebc720b4cf990aedcc"),
            (76, "0af451c559a3844cda6ba9d65e33ac7cb63a5bd3b325262437b9d29dbbb174a1"),
            (148, "c7d9af4f6f79f05e4ae2c8e85b9a1f9064d3ad868e7eb234aea7e7429c96d502"),
        ] {
            let h = core(k).unwrap();
            let text: String = h.iter().map(|x| if *x > 0 { '1' } else { '0' }).collect();
            let digest = sha2::Sha256::digest(text.as_bytes());
            let hex: String = digest.iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(hex, want, "order {k}");
            assert!(orthogonal(&h, k as usize), "order {k}");
        }
    }

    #[test]
    fn every_size_of_the_models_has_a_transform() {
        for (n, k) in [
            (896, 28),
            (1536, 12),
            (3584, 28),
            (5120, 40),
            (4096, 1),
            (4864, 76),
            (2432, 76),
            (1216, 76),
            (608, 76),
            (8960, 140),
            (1120, 140),
            (18944, 148),
            (9472, 148),
            (4736, 148),
            (2368, 148),
            (13824, 108),
            (1728, 108),
            (27648, 108),
            (14336, 28),
            (28672, 28),
            (11008, 172),
            (576, 36),
            (768, 12),
            (192, 12),
        ] {
            assert_eq!(core_order(n), Some(k), "size {n}");
            assert!(n.is_multiple_of(k) && (n / k).is_power_of_two());
        }
        for n in [0, 3, 6, 172 * 3 * 5 * 7 * 11, 94] {
            assert_eq!(core_order(n), None, "size {n}");
        }
        assert_eq!(near(94), [88, 84, 96]);
    }

    #[test]
    fn every_core_that_is_promised_is_orthogonal() {
        for k in (4..=240).step_by(4).filter(|k| constructible(*k)) {
            assert!(orthogonal(&core(k).unwrap(), k as usize), "order {k}");
        }
        assert!(core(92).is_none());
    }
}
