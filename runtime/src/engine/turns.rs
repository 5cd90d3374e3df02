//! Cosine and sine of the angles of rotary embeddings, computed once for each position.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use qrmc_ir::{EngineError, RopeAttr};

use crate::cpu::{self, Isa, Pool};

/// Positions beyond this are no positions of a text.
const MOST: u32 = 1 << 24;

/// The angles of the positions from 0 on.
#[derive(Debug)]
pub(super) struct Turns {
    half: usize,
    /// `[positions, head_dim / 2]`
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// The angles that were asked for so far.
#[derive(Debug, Default)]
pub(super) struct AllTurns(Mutex<HashMap<RopeAttr, Arc<Turns>>>);

impl AllTurns {
    /// Angles for all of `positions`.
    pub(super) fn of(&self, attr: &RopeAttr, positions: &[i32]) -> Result<Arc<Turns>, EngineError> {
        let far = positions.iter().map(|p| p.unsigned_abs()).max().unwrap_or(0);
        if far > MOST {
            return Err(EngineError::System(format!("position {far} is beyond {MOST}")));
        }
        let need = far as usize + 1;
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(t) = all.get(attr).filter(|t| t.cos.len() >= need * t.half) {
            return Ok(t.clone());
        }
        let turns = Arc::new(Turns::new(attr, need.next_power_of_two().max(64)));
        all.insert(*attr, turns.clone());
        Ok(turns)
    }
}

impl Turns {
    fn new(attr: &RopeAttr, positions: usize) -> Self {
        let (freq, factor) = (attr.inv_freq(), attr.attention_factor());
        let mut out = Turns { half: freq.len(), cos: Vec::new(), sin: Vec::new() };
        for p in 0..positions {
            for f in &freq {
                // The angle is rounded to f32 once, as the definition of the operation has it.
                let angle = f64::from((p as f64 * f64::from(*f as f32)) as f32);
                out.cos.push((f64::from(angle.cos() as f32) * factor) as f32);
                out.sin.push((f64::from(angle.sin() as f32) * factor) as f32);
            }
        }
        out
    }

    /// Turns the heads of rows of `width` at these positions, in place; the positions repeat if there are more rows. A
    /// negative position turns back what its magnitude turned.
    pub(super) fn turn(&self, pool: &Pool, isa: Isa, positions: &[i32], width: usize, x: &mut [f32]) {
        let half = self.half;
        let Some(&first) = positions.first() else { return };
        let heads = width / (2 * half);
        let run = |(i, &p): (usize, &i32)| p >= 0 && i64::from(p) == i64::from(first) + i as i64;
        if positions.iter().enumerate().all(run) {
            let span = first as usize * half..(first as usize + positions.len()) * half;
            cpu::rope_inplace(pool, isa, x, heads, 2 * half, &self.cos[span.clone()], &self.sin[span]);
            return;
        }
        let row = |p: i32| p.unsigned_abs() as usize * half..(p.unsigned_abs() as usize + 1) * half;
        let cos: Vec<f32> = positions.iter().flat_map(|&p| &self.cos[row(p)]).copied().collect();
        let turned = |&p: &i32| self.sin[row(p)].iter().map(move |s| if p < 0 { -s } else { *s });
        let sin: Vec<f32> = positions.iter().flat_map(turned).collect();
        cpu::rope_inplace(pool, isa, x, heads, 2 * half, &cos, &sin);
    }
}
