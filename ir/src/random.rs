//! The random generators of Python, numpy and Hugging Face `datasets`, bit for bit.
//!
//! Published calibration sets are defined by a seed and one of these generators, so choosing the same documents and
//! windows means drawing the same numbers.

const N: usize = 624;
const M: usize = 397;

/// The Mersenne Twister MT19937, the generator under Python's `random`, numpy's `RandomState` and PyTorch's CPU streams.
#[derive(Clone)]
struct Mt19937 {
    state: [u32; N],
    index: usize,
}

impl Mt19937 {
    /// The reference `init_genrand`: numpy's `np.random.seed(s)` and PyTorch's `manual_seed(s)`.
    fn init_genrand(seed: u32) -> Self {
        let mut state = [0u32; N];
        state[0] = seed;
        for i in 1..N {
            let prev = state[i - 1];
            state[i] = 1_812_433_253u32.wrapping_mul(prev ^ (prev >> 30)).wrapping_add(i as u32);
        }
        Self { state, index: N }
    }

    /// The reference `init_by_array`; `key` must not be empty.
    fn init_by_array(key: &[u32]) -> Self {
        let mut mt = Self::init_genrand(19_650_218);
        let s = &mut mt.state;
        let (mut i, mut j) = (1, 0);
        for _ in 0..N.max(key.len()) {
            let mix = (s[i - 1] ^ (s[i - 1] >> 30)).wrapping_mul(1_664_525);
            s[i] = (s[i] ^ mix).wrapping_add(key[j]).wrapping_add(j as u32);
            i += 1;
            j = (j + 1) % key.len();
            if i == N {
                s[0] = s[N - 1];
                i = 1;
            }
        }
        for _ in 0..N - 1 {
            let mix = (s[i - 1] ^ (s[i - 1] >> 30)).wrapping_mul(1_566_083_941);
            s[i] = (s[i] ^ mix).wrapping_sub(i as u32);
            i += 1;
            if i == N {
                s[0] = s[N - 1];
                i = 1;
            }
        }
        s[0] = 0x8000_0000;
        mt
    }

    fn refill(&mut self) {
        let s = &mut self.state;
        for k in 0..N {
            let y = (s[k] & 0x8000_0000) | (s[(k + 1) % N] & 0x7fff_ffff);
            let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
            s[k] = s[(k + M) % N] ^ (y >> 1) ^ odd;
        }
        self.index = 0;
    }

    fn next_u32(&mut self) -> u32 {
        if self.index >= N {
            self.refill();
        }
        let mut y = self.state[self.index];
        self.index += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }
}

/// Python's `random.Random(seed)` for a non-negative integer seed.
#[derive(Clone)]
pub struct PyRandom(Mt19937);

impl PyRandom {
    /// `random.seed(seed)`.
    pub fn new(seed: u64) -> Self {
        let (low, high) = (seed as u32, (seed >> 32) as u32);
        let key = [low, high];
        Self(Mt19937::init_by_array(if high == 0 { &key[..1] } else { &key }))
    }

    /// `getrandbits(k)` for `k` up to 64; a larger `k` counts as 64.
    pub fn getrandbits(&mut self, k: u32) -> u64 {
        match k.min(64) {
            0 => 0,
            k @ 1..=32 => u64::from(self.0.next_u32() >> (32 - k)),
            k => {
                let low = u64::from(self.0.next_u32());
                low | (u64::from(self.0.next_u32() >> (64 - k)) << 32)
            }
        }
    }

    /// A uniform draw in `0..n`, as Python's `_randbelow`; 0 when `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        let bits = 64 - n.leading_zeros();
        if bits == 0 {
            return 0;
        }
        loop {
            let r = self.getrandbits(bits);
            if r < n {
                return r;
            }
        }
    }

    /// `randint(a, b)`, both ends inclusive; `a` when the range is empty or has one element.
    ///
    /// Python draws once even for a range of one element, and so does this.
    pub fn randint(&mut self, a: u64, b: u64) -> u64 {
        match b.checked_sub(a) {
            None => a,
            Some(u64::MAX) => self.getrandbits(64),
            Some(width) => a + self.below(width + 1),
        }
    }

    /// `shuffle(items)` in place.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let j = self.below(i as u64 + 1) as usize;
            items.swap(i, j);
        }
    }
}

/// numpy's legacy generator, `np.random.seed(seed)`; its raw 32-bit stream is also that of PyTorch's `manual_seed`.
#[derive(Clone)]
pub struct LegacyNumpy {
    mt: Mt19937,
    cached: Option<f64>,
}

impl LegacyNumpy {
    /// `np.random.seed(seed)`.
    pub fn new(seed: u32) -> Self {
        Self { mt: Mt19937::init_genrand(seed), cached: None }
    }

    /// The next raw 32-bit output. `torch.randint(0, m, ...)` on the CPU is this modulo `m`.
    pub fn next_u32(&mut self) -> u32 {
        self.mt.next_u32()
    }

    /// A double in `[0, 1)` with 53 random bits, as `random_sample`.
    pub fn next_f64(&mut self) -> f64 {
        let a = f64::from(self.mt.next_u32() >> 5);
        let b = f64::from(self.mt.next_u32() >> 6);
        (a * 67_108_864.0 + b) / 9_007_199_254_740_992.0
    }

    /// A standard normal value, as `randn`: the polar method, whose second value is kept for the next call.
    pub fn randn(&mut self) -> f64 {
        if let Some(value) = self.cached.take() {
            return value;
        }
        loop {
            let x1 = 2.0 * self.next_f64() - 1.0;
            let x2 = 2.0 * self.next_f64() - 1.0;
            let r2 = x1 * x1 + x2 * x2;
            if r2 < 1.0 && r2 != 0.0 {
                let f = (-2.0 * r2.ln() / r2).sqrt();
                self.cached = Some(f * x1);
                return f * x2;
            }
        }
    }
}

/// PCG64 (XSL-RR 128/64) seeded through numpy's `SeedSequence`: the stream of `np.random.default_rng(seed)`.
#[derive(Clone, Debug)]
pub struct Pcg64 {
    state: u128,
    inc: u128,
    half: Option<u32>,
}

const PCG_MULT: u128 = 0x2360_ED05_1FC6_5DA4_4385_DF64_9FCC_F645;

impl Pcg64 {
    /// `np.random.default_rng(seed)` for a non-negative integer seed.
    pub fn new(seed: u64) -> Self {
        let w = seed_sequence(seed);
        let (state, seq) =
            (u128::from(w[0]) << 64 | u128::from(w[1]), u128::from(w[2]) << 64 | u128::from(w[3]));
        let mut rng = Self { state: 0, inc: seq << 1 | 1, half: None };
        rng.step();
        rng.state = rng.state.wrapping_add(state);
        rng.step();
        rng
    }

    fn step(&mut self) {
        self.state = self.state.wrapping_mul(PCG_MULT).wrapping_add(self.inc);
    }

    /// The next 64-bit output.
    pub fn next_u64(&mut self) -> u64 {
        self.step();
        let folded = (self.state >> 64) as u64 ^ self.state as u64;
        folded.rotate_right((self.state >> 122) as u32)
    }

    /// The next 32-bit output: the low half of a 64-bit one, then its high half.
    pub fn next_u32(&mut self) -> u32 {
        if let Some(high) = self.half.take() {
            return high;
        }
        let word = self.next_u64();
        self.half = Some((word >> 32) as u32);
        word as u32
    }

    /// A double in `[0, 1)` with 53 random bits, as `Generator.random()`.
    pub fn next_f64(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / 9_007_199_254_740_992.0
    }

    /// A uniform draw in `0..=max`: 32-bit draws under the smallest mask that holds `max`, rejected while too large.
    /// numpy shuffles with this, and not with the multiplication by which it bounds integers elsewhere.
    fn up_to(&mut self, max: u32) -> u32 {
        if max == 0 {
            return 0;
        }
        let mask = u32::MAX >> max.leading_zeros();
        loop {
            let value = self.next_u32() & mask;
            if value <= max {
                return value;
            }
        }
    }
}

/// The order of rows after Hugging Face `Dataset.shuffle(seed)`: `np.random.default_rng(seed).permutation(n)`.
pub fn hf_permutation(seed: u64, n: u32) -> Vec<u32> {
    let mut rng = Pcg64::new(seed);
    let mut order: Vec<u32> = (0..n).collect();
    for i in (1..n).rev() {
        let j = rng.up_to(i);
        order.swap(i as usize, j as usize);
    }
    order
}

/// numpy's `SeedSequence(seed).generate_state(4, np.uint64)`.
fn seed_sequence(seed: u64) -> [u64; 4] {
    const MULT_A: u32 = 0x931e_8875;
    const MULT_B: u32 = 0x58f3_8ded;
    let mut hash = 0x43b0_d7e5u32;
    let mut hashmix = |value: u32| {
        let mut v = value ^ hash;
        hash = hash.wrapping_mul(MULT_A);
        v = v.wrapping_mul(hash);
        v ^ (v >> 16)
    };
    // Words beyond the entropy hash as zeros, so a 32-bit and a 64-bit seed share this path.
    let entropy = [seed as u32, (seed >> 32) as u32, 0, 0];
    let mut pool = entropy.map(&mut hashmix);
    for src in 0..4 {
        for dst in 0..4 {
            if src != dst {
                let y = hashmix(pool[src]);
                let v = 0xca01_f9ddu32.wrapping_mul(pool[dst]).wrapping_sub(0x4973_f715u32.wrapping_mul(y));
                pool[dst] = v ^ (v >> 16);
            }
        }
    }
    let mut hash = 0x8b51_f9ddu32;
    let mut word = |i: usize| {
        let mut v = pool[i % 4] ^ hash;
        hash = hash.wrapping_mul(MULT_B);
        v = v.wrapping_mul(hash);
        u64::from(v ^ (v >> 16))
    };
    std::array::from_fn(|i| word(2 * i) | word(2 * i + 1) << 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn python_randint_stream() {
        let mut rng = PyRandom::new(0);
        let got: Vec<u64> = (0..8).map(|_| rng.randint(0, 9999)).collect();
        assert_eq!(got, [6311, 6890, 663, 4242, 8376, 7961, 6634, 4969]);
        let mut rng = PyRandom::new(0);
        let got: Vec<u64> = (0..4).map(|_| rng.randint(0, 1_000_000 - 2048 - 1)).collect();
        assert_eq!(got, [885_440, 403_958, 794_772, 933_488]);
    }

    #[test]
    fn python_choice_streams_of_four() {
        let draw = |seed| {
            let mut rng = PyRandom::new(seed);
            (0..12).map(|_| rng.randint(0, 3)).collect::<Vec<_>>()
        };
        assert_eq!(draw(1234), [3, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 0]);
        assert_eq!(draw(42), [0, 0, 2, 1, 1, 1, 0, 0, 3, 0, 0, 0]);
    }

    #[test]
    fn python_shuffle() {
        let mut items: Vec<u32> = (0..10).collect();
        PyRandom::new(42).shuffle(&mut items);
        assert_eq!(items, [7, 3, 2, 8, 5, 6, 9, 4, 0, 1]);
        PyRandom::new(1).shuffle::<u8>(&mut []);
    }

    #[test]
    fn python_wide_draws() {
        // random.seed(2**40 + 7): getrandbits(64), getrandbits(33), getrandbits(7).
        let mut rng = PyRandom::new((1 << 40) + 7);
        assert_eq!(rng.getrandbits(64), WIDE.0);
        assert_eq!(rng.getrandbits(33), WIDE.1);
        assert_eq!(rng.getrandbits(7), WIDE.2);
        assert_eq!(rng.getrandbits(0), 0);
        assert_eq!((rng.randint(5, 5), rng.randint(9, 3)), (5, 9));
        assert!(rng.randint(0, u64::MAX) > 0);
    }
    const WIDE: (u64, u64, u64) = (13785699202830676186, 7795006133, 120);

    #[test]
    fn genrand_stream() {
        let mut rng = LegacyNumpy::new(0);
        let got: Vec<u32> = (0..10).map(|_| rng.next_u32()).collect();
        let want = [
            2357136044, 2546248239, 3071714933, 3626093760, 2588848963, 3684848379, 2340255427, 3638918503,
            1819583497, 2678185683,
        ];
        assert_eq!(got, want);
        assert_eq!(got.iter().map(|v| v % 2).collect::<Vec<_>>(), [0, 1, 1, 0, 1, 1, 1, 1, 1, 1]);
        assert_eq!(got.iter().map(|v| v % 10).collect::<Vec<_>>(), [4, 9, 3, 0, 3, 9, 7, 3, 7, 3]);
    }

    #[test]
    fn legacy_normals() {
        let mut rng = LegacyNumpy::new(0);
        let got: Vec<f64> = (0..4).map(|_| rng.randn()).collect();
        for (a, b) in
            got.iter().zip([1.764052345967664, 0.4001572083672233, 0.9787379841057392, 2.240893199201458])
        {
            assert!((a - b).abs() < 1e-15, "{a} {b}");
        }
    }

    #[test]
    fn dataset_shuffle() {
        assert_eq!(hf_permutation(42, 10), [5, 6, 0, 7, 3, 2, 4, 9, 1, 8]);
        let want = [148233, 143250, 54461, 160944, 92300, 213774, 21150, 120635, 144016, 173010];
        assert_eq!(hf_permutation(42, 214_670)[..10], want);
        assert_eq!(hf_permutation(7, 0), [0u32; 0]);
        assert_eq!(hf_permutation(7, 1), [0]);
    }

    #[test]
    fn pcg_doubles_and_wide_seed() {
        // np.random.default_rng(42).random(3) and default_rng(2**40 + 7).random(2).
        let mut rng = Pcg64::new(42);
        assert_eq!(
            [rng.next_f64(), rng.next_f64(), rng.next_f64()],
            [0.7739560485559633, 0.4388784397520523, 0.8585979199113825]
        );
        let mut rng = Pcg64::new((1 << 40) + 7);
        assert_eq!([rng.next_f64(), rng.next_f64()], [0.829812891829413, 0.25530515834910417]);
    }
}
