//! Quantizers of values that are known when the model runs, by the formulas of [`qrmc_ir::grid`] in standard operators.
//! Codes and zero points are whole numbers in `f32` here.

use qrmc_ir::{Diag, Dim, Elem, Grain, Op, QuantSpec, Rule, ScaleType, TensorType};

use super::ops::rounded;
use super::walk::{Coded, Value, Walk};
use super::{Form, OnnxError};

/// Least range before it is divided by the number of steps, for the rules of weights.
const MIN_RANGE: f32 = 1e-5;

/// A tensor whose runs that share a scale are its last axis.
struct Runs {
    data: String,
    /// Sizes that bring the tensor back, if it was cut.
    back: Option<Vec<i64>>,
    /// Whether all axes are one run.
    whole: bool,
}

impl Walk<'_> {
    /// `fake_quant`, `qparams` or `qcast`.
    pub(super) fn quantizer(
        &mut self,
        op: &Op,
        ins: &[&Value],
        ty: &TensorType,
    ) -> Result<Vec<Value>, OnnxError> {
        let x = self.plain(ins[0], ty)?;
        let mut sides = Vec::new();
        for v in &ins[1..] {
            sides.push(self.side(v)?);
        }
        match *op {
            Op::FakeQuant(spec, rule) => {
                let runs = self.runs(&x, ty, spec);
                let (scale, zero) = self.params(&runs, ty, spec, rule, &sides)?;
                let codes = self.codes(&runs.data, &scale, zero.as_deref(), spec);
                if self.form == Form::Ort && spec.grain == Grain::Token {
                    return Ok(vec![Value::Coded(Coded { codes, scale, zero, spec })]);
                }
                let y = self.value(&codes, &scale, zero.as_deref());
                Ok(vec![Value::Plain(self.joined(&y, &runs))])
            }
            Op::QParams(spec, rule) => {
                let runs = self.runs(&x, ty, spec);
                let (scale, zero) = self.params(&runs, ty, spec, rule, &sides)?;
                let out = [Some(scale), zero].into_iter().flatten();
                Ok(out.map(|s| Value::Plain(self.narrow(&s, ty, spec))).collect())
            }
            Op::QCast(spec) => {
                let runs = self.runs(&x, ty, spec);
                let sides: Vec<String> = sides.iter().map(|s| self.widen(s, spec)).collect();
                let codes = self.codes(&runs.data, &sides[0], sides.get(1).map(String::as_str), spec);
                Ok(vec![Value::Plain(self.joined(&codes, &runs))])
            }
            _ => unreachable!("the caller hands over quantizers"),
        }
    }

    /// `dcast` of codes that are known when the model runs.
    pub(super) fn dcast(&mut self, ins: &[&Value], ty: &TensorType) -> Result<Value, OnnxError> {
        let (Elem::Quant(spec), Value::Plain(codes)) = (ty.elem, ins[0]) else {
            let d = Diag::new("Q0501", format!("{ty} is stored, its scales are computed"));
            return Err(d.hint("compile the model: an artefact holds both").into());
        };
        let codes = codes.clone();
        let runs = self.runs(&codes, ty, spec);
        let mut sides = Vec::new();
        for v in &ins[1..] {
            let side = self.side(v)?;
            sides.push(self.widen(&side, spec));
        }
        let y = self.value(&runs.data, &sides[0], sides.get(1).map(String::as_str));
        Ok(Value::Plain(self.joined(&y, &runs)))
    }

    /// Scales, zero points or factors as floats.
    fn side(&mut self, v: &Value) -> Result<String, OnnxError> {
        match v {
            Value::Plain(name) => Ok(name.clone()),
            Value::Weight(id) => self.weights.float(&mut self.g, *id),
            Value::Packed(_) | Value::Coded(_) | Value::Heads(_) | Value::Positions(_) => {
                Err(Diag::new("Q0501", "scales that are no plain tensor").into())
            }
        }
    }

    fn runs(&mut self, x: &str, ty: &TensorType, spec: QuantSpec) -> Runs {
        let mut runs = Runs { data: x.to_owned(), back: None, whole: spec.grain == Grain::Tensor };
        if let (Grain::Group(run), Some(Dim::Fixed(n))) = (spec.grain, ty.shape.last()) {
            let lead = vec![0; ty.shape.rank() - 1];
            let cut = [(n / u64::from(run)) as i64, i64::from(run)];
            runs.data = self.g.reshape(x, &[&lead[..], &cut].concat());
            runs.back = Some([&lead[..], &[n as i64]].concat());
        }
        runs
    }

    fn joined(&mut self, y: &str, runs: &Runs) -> String {
        match &runs.back {
            Some(sizes) => self.g.reshape(y, sizes),
            None => y.to_owned(),
        }
    }

    /// Scales in the shape of the IR, from those beside the runs.
    fn narrow(&mut self, side: &str, ty: &TensorType, spec: QuantSpec) -> String {
        match spec.grain {
            Grain::Group(_) => {
                let axes = self.g.ints(&[ty.shape.rank() as i64]);
                self.g.op("Squeeze", &[side, &axes])
            }
            Grain::Tensor => self.g.reshape(side, &[1]),
            Grain::Row | Grain::Token | Grain::Channel => side.to_owned(),
        }
    }

    /// The way back of [`Walk::narrow`].
    fn widen(&mut self, side: &str, spec: QuantSpec) -> String {
        let Grain::Group(_) = spec.grain else { return side.to_owned() };
        let axes = self.g.ints(&[-1]);
        self.g.op("Unsqueeze", &[side, &axes])
    }

    /// Largest or smallest element of each run.
    fn end(&mut self, op: &str, runs: &Runs) -> String {
        if runs.whole {
            return self.g.op(op, &[&runs.data]);
        }
        let axes = self.g.ints(&[-1]);
        self.g.op(op, &[&runs.data, &axes])
    }

    /// Scales, and zero points if the scheme has them, beside the runs.
    fn params(
        &mut self,
        runs: &Runs,
        ty: &TensorType,
        spec: QuantSpec,
        rule: Rule,
        factors: &[String],
    ) -> Result<(String, Option<String>), OnnxError> {
        let floor = match rule {
            Rule::Dynamic => 0.0,
            Rule::MinMax => MIN_RANGE,
            Rule::Awq | Rule::Mse => {
                let d = Diag::new("Q0501", format!("rule `{rule}` is for weights"));
                return Err(d.hint("compile the model: an artefact holds the codes of its weights").into());
            }
        };
        let (nothing, floor) = (self.g.scalar(0.0), self.g.scalar(floor));
        let [max, min] = [("ReduceMax", "Max"), ("ReduceMin", "Min")].map(|(end, with)| {
            let end = self.end(end, runs);
            self.g.op(with, &[&end, &nothing])
        });
        let (max, min) = match factors {
            [hi, lo] => {
                let [hi, lo] = [hi, lo].map(|f| self.factors(f, ty, spec));
                (self.g.op("Mul", &[&max, &hi]), self.g.op("Mul", &[&min, &lo]))
            }
            _ => (max, min),
        };
        if !spec.zero {
            let low = self.g.op("Neg", &[&min]);
            let size = self.g.op("Max", &[&max, &low, &floor]);
            let steps = self.g.scalar(((1i32 << (spec.bits - 1)) - 1) as f32);
            let scale = self.g.op("Div", &[&size, &steps]);
            let empty = self.g.op("Equal", &[&size, &nothing]);
            let unit = self.g.scalar(1.0);
            let scale = self.g.op("Where", &[&empty, &unit, &scale]);
            return Ok((self.stored(&scale, spec), None));
        }
        let [top, bottom] = [&max, &min].map(|end| self.g.op("Equal", &[end, &nothing]));
        let empty = self.g.op("And", &[&top, &bottom]);
        let [max, min] = [(&max, 1.0), (&min, -1.0)].map(|(end, unit)| {
            let unit = self.g.scalar(unit);
            self.g.op("Where", &[&empty, &unit, end])
        });
        let width = self.g.op("Sub", &[&max, &min]);
        let width = self.g.op("Max", &[&width, &floor]);
        let steps = self.g.scalar(((1i32 << spec.bits) - 1) as f32);
        let scale = self.g.op("Div", &[&width, &steps]);
        let scale = self.stored(&scale, spec);
        let low = self.g.op("Neg", &[&min]);
        let zero = self.g.op("Div", &[&low, &scale]);
        let zero = self.g.op("Round", &[&zero]);
        let zero = self.limited(&zero, spec);
        Ok((scale, Some(zero)))
    }

    /// The scale as the scheme stores it, and never 0.
    fn stored(&mut self, scale: &str, spec: QuantSpec) -> String {
        let round = match spec.scale {
            ScaleType::F32 => scale.to_owned(),
            ScaleType::F16 | ScaleType::BF16 => rounded(&mut self.g, scale, spec.scale.elem()),
        };
        let (nothing, least) = (self.g.scalar(0.0), self.g.scalar(f32::MIN_POSITIVE));
        let good = self.g.op("Greater", &[&round, &nothing]);
        let other = self.g.op("Max", &[scale, &least]);
        self.g.op("Where", &[&good, &round, &other])
    }

    /// Factors beside the runs: neighbours share one.
    fn factors(&mut self, f: &str, ty: &TensorType, spec: QuantSpec) -> String {
        let (Grain::Group(run), Some(Dim::Fixed(n))) = (spec.grain, ty.shape.last()) else {
            return f.to_owned();
        };
        let runs = (n / u64::from(run)) as i64;
        // [k] -> [k, 1] -> [k, runs / k] -> [runs, 1]; Expand keeps the size k.
        let column = self.g.reshape(f, &[-1, 1]);
        let count = self.g.op("Shape", &[f]);
        let all = self.g.ints(&[runs]);
        let share = self.g.op("Div", &[&all, &count]);
        let sizes = self.g.op_with("Concat", &[&count, &share], vec![super::proto::int("axis", 0)]);
        let spread = self.g.op("Expand", &[&column, &sizes]);
        self.g.reshape(&spread, &[-1, 1])
    }

    fn limited(&mut self, x: &str, spec: QuantSpec) -> String {
        let [low, high] = [spec.qmin(), spec.qmax()].map(|q| self.g.scalar(q as f32));
        self.g.op("Clip", &[x, &low, &high])
    }

    /// `clamp(round(x / scale) + zero)`
    fn codes(&mut self, x: &str, scale: &str, zero: Option<&str>, spec: QuantSpec) -> String {
        let y = self.g.op("Div", &[x, scale]);
        let y = self.g.op("Round", &[&y]);
        let y = match zero {
            Some(zero) => self.g.op("Add", &[&y, zero]),
            None => y,
        };
        self.limited(&y, spec)
    }

    /// `scale * (code - zero)`
    pub(super) fn value(&mut self, codes: &str, scale: &str, zero: Option<&str>) -> String {
        let y = match zero {
            Some(zero) => self.g.op("Sub", &[codes, zero]),
            None => codes.to_owned(),
        };
        self.g.op("Mul", &[&y, scale])
    }
}
