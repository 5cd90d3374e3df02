//! Choosing the next token from a row of logits.
//!
//! Sampling is deterministic: [`Sampler`] draws from PCG64 seeded as numpy's `default_rng(seed)`, one 53-bit double a
//! token, and all sums are taken in f64 in a fixed order. A sampler belongs to one request, so that an answer does not
//! depend on what else runs in its batch.

use std::cmp::Ordering;

use crate::text::random::Pcg64;

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleParams {
    /// Logits are divided by this; 0 takes the largest logit and draws nothing.
    pub temperature: f64,
    /// Keep only this many of the most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the fewest most probable tokens whose probabilities add up to at least this, from those that `top_k` left.
    pub top_p: f64,
    /// Seeds the draws.
    pub seed: u64,
}

impl Default for SampleParams {
    /// Greedy.
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

impl SampleParams {
    /// Checks the ranges.
    pub fn validate(&self) -> Result<(), SampleError> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(SampleError::Temperature(self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(SampleError::TopP(self.top_p));
        }
        Ok(())
    }
}

/// Why no token could be chosen.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// The temperature is negative or not finite.
    #[error("sampling: temperature is {0}; give 0 for greedy or a positive number")]
    Temperature(f64),
    /// `top_p` is outside `(0, 1]`.
    #[error("sampling: top_p is {0}; give a number above 0 and up to 1, where 1 keeps all tokens")]
    TopP(f64),
    /// There are no logits.
    #[error("sampling: the row of logits is empty; the model's vocabulary size must be at least 1")]
    Empty,
    /// A logit is NaN or positive infinity.
    #[error(
        "sampling: the logit of token {id} is {value}; the model's numbers are broken (check its scales with --check)"
    )]
    NotANumber {
        /// The first such token.
        id: usize,
        /// Its logit.
        value: f32,
    },
    /// Every logit is negative infinity.
    #[error("sampling: every logit is negative infinity; a mask forbids all {0} tokens")]
    AllMasked(usize),
}

/// The token with the largest logit; the lowest id among equals. Negative infinity marks a forbidden token.
pub fn greedy(logits: &[f32]) -> Result<u32, SampleError> {
    let mut best = 0;
    for (id, &value) in logits.iter().enumerate() {
        if value.is_nan() || value == f32::INFINITY {
            return Err(SampleError::NotANumber { id, value });
        }
        if value > logits[best] {
            best = id;
        }
    }
    match logits.get(best) {
        None => Err(SampleError::Empty),
        Some(&f32::NEG_INFINITY) => Err(SampleError::AllMasked(logits.len())),
        Some(_) => Ok(best as u32),
    }
}

/// Chooses the tokens of one request.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SampleParams,
    rng: Pcg64,
    kept: Vec<(u32, f64)>,
}

impl Sampler {
    /// Makes a sampler; parameters out of range are refused.
    pub fn new(params: SampleParams) -> Result<Self, SampleError> {
        params.validate()?;
        Ok(Self { params, rng: Pcg64::new(params.seed), kept: Vec::new() })
    }

    /// The parameters.
    pub fn params(&self) -> &SampleParams {
        &self.params
    }

    /// Chooses the next token: temperature, then `top_k`, then `top_p`, then one draw. Ties go to the lower id.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32, SampleError> {
        let best = greedy(logits)?;
        if self.params.temperature == 0.0 {
            return Ok(best);
        }
        self.weigh(logits, f64::from(logits[best as usize]));
        self.keep_top_k();
        self.keep_top_p();
        // Drawing in id order makes a cut that removes nothing change nothing.
        self.kept.sort_unstable_by_key(|&(id, _)| id);
        let total: f64 = self.kept.iter().map(|&(_, w)| w).sum();
        let target = self.rng.next_f64() * total;
        let mut sum = 0.0;
        for &(id, weight) in &self.kept {
            sum += weight;
            if sum > target {
                return Ok(id);
            }
        }
        Ok(best)
    }

    /// Unnormalised probabilities; the best token weighs 1, and tokens too small to be drawn are left out.
    fn weigh(&mut self, logits: &[f32], best: f64) {
        let temperature = self.params.temperature;
        let weigh =
            |(id, &logit): (usize, &f32)| (id as u32, ((f64::from(logit) - best) / temperature).exp());
        self.kept.clear();
        self.kept.extend(logits.iter().enumerate().map(weigh).filter(|&(_, w)| w > 0.0));
    }

    fn keep_top_k(&mut self) {
        let k = self.params.top_k;
        if k > 0 && k < self.kept.len() {
            self.kept.select_nth_unstable_by(k - 1, by_weight);
            self.kept.truncate(k);
        }
    }

    fn keep_top_p(&mut self) {
        let p = self.params.top_p;
        if p >= 1.0 {
            return;
        }
        self.kept.sort_unstable_by_key(|&(id, _)| id);
        let total: f64 = self.kept.iter().map(|&(_, w)| w).sum();
        // All tokens below this weigh less than `1 - p` together, so the cut does not lie there and only the rest need
        // sorting. The heaviest token is never below it.
        let floor = (1.0 - p) * total / self.kept.len() as f64;
        self.kept.retain(|&(_, w)| w >= floor);
        self.kept.sort_unstable_by(by_weight);
        let mut sum = 0.0;
        let enough = |&(_, w): &(u32, f64)| {
            sum += w;
            sum >= p * total
        };
        if let Some(last) = self.kept.iter().position(enough) {
            self.kept.truncate(last + 1);
        }
    }
}

/// Heavier first, then the lower id.
fn by_weight(a: &(u32, f64), b: &(u32, f64)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(params: SampleParams, logits: &[f32], draws: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(params).unwrap();
        let mut out = vec![0; logits.len()];
        for _ in 0..draws {
            out[sampler.sample(logits).unwrap() as usize] += 1;
        }
        out
    }

    const WARM: SampleParams = SampleParams { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 42 };

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        assert_eq!(greedy(&[1.0, 3.0, 3.0, 2.0]), Ok(1));
        assert_eq!(greedy(&[f32::NEG_INFINITY, -5.0]), Ok(1));
        assert_eq!(Sampler::new(SampleParams::default()).unwrap().sample(&[0.0, 0.0]), Ok(0));
    }

    #[test]
    fn broken_rows_are_errors() {
        let mut warm = Sampler::new(WARM).unwrap();
        for sample in [&mut |row: &[f32]| greedy(row), &mut |row: &[f32]| warm.sample(row)]
            as [&mut dyn FnMut(&[f32]) -> Result<u32, SampleError>; 2]
        {
            assert!(matches!(sample(&[0.0, f32::NAN]), Err(SampleError::NotANumber { id: 1, .. })));
            assert!(matches!(sample(&[f32::INFINITY]), Err(SampleError::NotANumber { id: 0, .. })));
            assert_eq!(sample(&[]), Err(SampleError::Empty));
            assert_eq!(sample(&[f32::NEG_INFINITY; 2]), Err(SampleError::AllMasked(2)));
        }
    }

    #[test]
    fn ranges_are_checked() {
        for temperature in [-0.1, f64::NAN, f64::INFINITY] {
            assert!(Sampler::new(SampleParams { temperature, ..WARM }).is_err());
        }
        for top_p in [0.0, -1.0, 1.5, f64::NAN] {
            assert!(Sampler::new(SampleParams { top_p, ..WARM }).is_err());
        }
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let logits = [0.0f32, 1.0, 2.0, f32::NEG_INFINITY];
        for temperature in [0.6, 1.0, 2.0] {
            let got = counts(SampleParams { temperature, ..WARM }, &logits, 40_000);
            let weights: Vec<f64> = logits.iter().map(|&l| (f64::from(l) / temperature).exp()).collect();
            let total: f64 = weights.iter().sum();
            for (n, w) in got.iter().zip(weights) {
                assert!((*n as f64 / 40_000.0 - w / total).abs() < 0.01, "{got:?}");
            }
        }
    }

    #[test]
    fn top_k_and_top_p_cut_where_they_say() {
        // Probabilities 1/10, 4/10, 2/10, 2/10, 1/10.
        let logits = [1.0f32, 4.0, 2.0, 2.0, 1.0].map(f32::ln);
        let seen = |top_k, top_p| {
            let got = counts(SampleParams { top_k, top_p, ..WARM }, &logits, 2000);
            (0..5).filter(|&i| got[i] > 0).collect::<Vec<_>>()
        };
        assert_eq!(seen(0, 1.0), [0, 1, 2, 3, 4]);
        assert_eq!(seen(1, 1.0), [1]);
        assert_eq!(seen(2, 1.0), [1, 2]);
        assert_eq!(seen(4, 1.0), [0, 1, 2, 3]);
        assert_eq!(seen(9, 1.0), [0, 1, 2, 3, 4]);
        assert_eq!(seen(0, 1e-9), [1]);
        assert_eq!(seen(0, 0.5), [1, 2]);
        assert_eq!(seen(0, 0.7), [1, 2, 3]);
        assert_eq!(seen(0, 0.999), [0, 1, 2, 3, 4]);
        // After top_k = 2 the two are 4/6 and 2/6.
        assert_eq!(seen(2, 0.6), [1]);
        assert_eq!(seen(2, 0.7), [1, 2]);
    }

    #[test]
    fn a_cut_that_removes_nothing_changes_nothing() {
        let logits: Vec<f32> = (0..500).map(|i| ((i * 37) % 101) as f32 / 20.0).collect();
        let draw = |top_k, top_p| {
            let mut sampler = Sampler::new(SampleParams { top_k, top_p, ..WARM }).unwrap();
            (0..200).map(|_| sampler.sample(&logits).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(0, 1.0), draw(500, 1.0));
        assert_eq!(draw(0, 1.0), draw(0, 1.0 - 1e-12));
        assert_ne!(draw(0, 1.0), draw(5, 1.0));
    }

    #[test]
    fn the_floor_does_not_move_the_cut() {
        let logits: Vec<f32> = (0..300).map(|i| ((i * 7919) % 613) as f32 / 60.0).collect();
        for p in [0.05, 0.3, 0.5, 0.9, 0.95, 0.999] {
            let mut sampler = Sampler::new(SampleParams { top_p: p, ..WARM }).unwrap();
            sampler.weigh(&logits, f64::from(logits[greedy(&logits).unwrap() as usize]));
            let mut all = sampler.kept.clone();
            let total: f64 = all.iter().map(|&(_, w)| w).sum();
            all.sort_unstable_by(by_weight);
            let mut sum = 0.0;
            let cut = all
                .iter()
                .position(|&(_, w)| {
                    sum += w;
                    sum >= p * total
                })
                .unwrap();
            sampler.keep_top_p();
            assert_eq!(sampler.kept, all[..=cut]);
        }
    }
}
