//! The CPU engine: lowers functions once, prepares their weights, runs their programs.

mod cache;
mod consts;
mod exec;
mod kv;
mod memory;
mod prims;
mod products;
mod quantize;
mod rows;
mod turns;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use qrmc_ir::linalg::MatView;
use qrmc_ir::{
    Engine, EngineError, Func, FuncId, Hash, Module, Op, Prepared, Tensor, TensorType, WeightId,
    WeightSource, structural_hash,
};
use qrmc_lowering::{Cpu, Kernel, Program, lower_func, weight_order};

#[cfg(target_arch = "x86_64")]
use crate::cpu::split::Amx;
use crate::cpu::tiles::IntPath;
use crate::cpu::{Isa, MatRef, Pool, Scratch};
use crate::layout::Tiled;
use consts::Constant;

pub use cache::{KvStore, Order, PAGE, Segment, Segments, Sequence, Table};
pub use consts::Source;
pub use exec::{Input, Watch};

/// Fewer rows than this are not worth the packing for the matrix unit.
const UNIT_ROWS: usize = 64;

/// What all programs of an engine share.
struct Machine {
    pool: Arc<Pool>,
    isa: Isa,
    scratch: Arc<Scratch>,
    /// Shared with the coarse engine: what one of them left is of no use while the other runs.
    spare: Arc<memory::Spare>,
    /// How products of codes are computed.
    path: IntPath,
    digits: memory::Cuts,
    turns: turns::AllTurns,
    #[cfg(target_arch = "x86_64")]
    amx: Option<Amx>,
    /// Whether products of `f32` are split products, where there is a matrix unit.
    coarse: bool,
}

impl Machine {
    /// `out[m, n] = a bᵀ` over `k` on the matrix unit, if this machine has one, it is as exact as asked, and the product
    /// pays.
    fn unit_product(
        &self,
        factors: Factors,
        a: Stored<'_>,
        b: Stored<'_>,
        shape: (usize, usize, usize),
        out: &mut [f32],
    ) -> bool {
        #[cfg(target_arch = "x86_64")]
        if let Some(amx) =
            self.amx.filter(|_| shape.0 >= UNIT_ROWS && (self.coarse || factors == Factors::Bf16))
        {
            use crate::cpu::split::{Operand, Parts};
            let [a, b] = [a, b].map(|x| match x {
                Stored::Rows(x) => Operand::Rows(x),
                Stored::Columns(x) => Operand::Columns(x),
                Stored::OnGrid(x, scales) => Operand::OnGrid(x, scales),
            });
            let parts = if factors == Factors::Bf16 { Parts::High } else { Parts::Both };
            amx.product(&self.pool, parts, a, b, shape, out, &self.scratch);
            return true;
        }
        let _ = (factors, a, b, shape, out);
        false
    }
}

/// What a product reads of its factors.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Factors {
    /// `f32`, or what a coarse engine makes of it.
    F32,
    /// The nearest bfloat16; a whole number on a grid is its own.
    Bf16,
}

/// An operand `[rows, k]` of a product, row after row or transposed.
#[derive(Clone, Copy)]
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "only a matrix unit reads it"))]
enum Stored<'a> {
    Rows(&'a [f32]),
    Columns(&'a [f32]),
    /// Row after row, and the scale of each: [`Operand::OnGrid`](crate::cpu::split::Operand).
    OnGrid(&'a [f32], &'a [f32]),
}

/// Runs functions on the CPU.
pub struct CpuEngine {
    machine: Arc<Machine>,
    programs: Mutex<HashMap<Hash, Arc<Program>>>,
    coarse: Option<Box<CpuEngine>>,
}

impl CpuEngine {
    /// An engine on this many threads.
    ///
    /// # Errors
    /// If the system refuses the threads.
    pub fn new(threads: usize) -> Result<Self, EngineError> {
        // The matrix unit is asked for before there are threads.
        #[cfg(target_arch = "x86_64")]
        let amx = Amx::request();
        let pool = Arc::new(Pool::new(threads).map_err(|e| EngineError::System(e.to_string()))?);
        let scratch = Arc::new(Scratch::new());
        let spare = Arc::new(memory::Spare::default());
        let with = |coarse: bool| {
            let machine = Machine {
                pool: pool.clone(),
                isa: Isa::detect(),
                scratch: scratch.clone(),
                spare: spare.clone(),
                #[cfg(target_arch = "x86_64")]
                path: IntPath::detect(amx),
                #[cfg(not(target_arch = "x86_64"))]
                path: IntPath::detect(),
                digits: memory::Cuts::default(),
                turns: turns::AllTurns::default(),
                #[cfg(target_arch = "x86_64")]
                amx,
                coarse,
            };
            CpuEngine { machine: Arc::new(machine), programs: Mutex::default(), coarse: None }
        };
        #[cfg(target_arch = "x86_64")]
        if amx.is_some() {
            return Ok(CpuEngine { coarse: Some(Box::new(with(true))), ..with(false) });
        }
        Ok(with(false))
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.machine.pool.threads()
    }

    /// Name of the instruction set in use.
    pub fn isa(&self) -> &'static str {
        self.machine.isa.name()
    }

    /// Name of the way in which products of codes are computed.
    pub fn int_path(&self) -> &'static str {
        self.machine.path.name()
    }

    /// The pool and instruction set, for work that is no function of the IR, such as log-probabilities.
    pub fn with_machine<R>(&self, f: impl FnOnce(&Pool, Isa) -> R) -> R {
        f(&self.machine.pool, self.machine.isa)
    }

    /// Lowers a function, or finds the program of one with the same structure.
    fn program(&self, module: &Module, func: &Func) -> Result<Arc<Program>, EngineError> {
        // A call names a function of its module, which the structure does not tell apart.
        if func.nodes.iter().any(|n| matches!(n.op, Op::Call(_))) {
            return Ok(Arc::new(lower_func(module, func, &Cpu)?));
        }
        let key = structural_hash(module, func);
        let mut programs = self.programs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(p) = programs.get(&key) {
            return Ok(p.clone());
        }
        let program = Arc::new(lower_func(module, func, &Cpu)?);
        programs.insert(key, program.clone());
        Ok(program)
    }

    /// As [`Engine::prepare`], with the concrete type.
    ///
    /// # Errors
    /// As [`Engine::prepare`].
    pub fn load(
        &self,
        module: &Module,
        func: &Func,
        weights: &dyn WeightSource,
    ) -> Result<Loaded, EngineError> {
        self.load_from(module, func, &mut Source::new(weights, None))
    }

    /// As [`CpuEngine::load`], from a source that several functions share.
    ///
    /// # Errors
    /// As [`Engine::prepare`].
    pub fn load_from(
        &self,
        module: &Module,
        func: &Func,
        source: &mut Source<'_>,
    ) -> Result<Loaded, EngineError> {
        let program = self.program(module, func)?;
        let func = qrmc_ir::prune(func);
        let order = weights(module, &func);
        let mut calls = HashMap::new();
        for f in called(&program) {
            if let std::collections::hash_map::Entry::Vacant(e) = calls.entry(f) {
                e.insert(self.load_from(module, module.func(f), source)?);
            }
        }
        let pool = &self.machine.pool;
        let derived = match &program.init {
            None => Vec::new(),
            Some(init) => {
                let init = Loaded {
                    machine: self.machine.clone(),
                    consts: consts::load(pool, init, &order, source, &mut [])?,
                    program: Arc::new((**init).clone()),
                    calls: HashMap::new(),
                };
                init.run_inputs(&mut [])?
            }
        };
        let mut derived: Vec<Option<Tensor>> = derived.into_iter().map(Some).collect();
        let consts = consts::load(pool, &program, &order, source, &mut derived)?;
        Ok(Loaded { machine: self.machine.clone(), program, consts, calls })
    }

    /// The weights that these functions keep in tiles, each once.
    ///
    /// # Errors
    /// If a function cannot run on this engine.
    pub fn tiled(&self, module: &Module, funcs: &[FuncId]) -> Result<Vec<Tiled>, EngineError> {
        let (mut out, mut seen, mut known) = (Vec::new(), HashSet::new(), HashSet::new());
        let mut todo: Vec<FuncId> = funcs.iter().rev().copied().collect();
        while let Some(id) = todo.pop() {
            if !seen.insert(id) {
                continue;
            }
            let program = self.program(module, module.func(id))?;
            let func = qrmc_ir::prune(module.func(id));
            let order = weights(module, &func);
            let consts = program.init.iter().flat_map(|p| &p.consts).chain(&program.consts);
            let tiled = consts.filter_map(|(c, _)| consts::tiled(c, &order));
            out.extend(tiled.filter(|t| known.insert(t.clone())));
            todo.extend(called(&program));
        }
        Ok(out)
    }
}

/// Names and types of the weights of a function, in the order in which programs number them. A program is shared by
/// structure, so they come from the function.
fn weights<'m>(module: &'m Module, pruned: &Func) -> Vec<(&'m str, &'m TensorType)> {
    let weight = |w: WeightId| (module.weight(w).name.as_str(), &module.weight(w).ty);
    weight_order(pruned).iter().map(|(w, _)| weight(*w)).collect()
}

/// Functions that a program calls.
fn called(program: &Program) -> impl Iterator<Item = FuncId> {
    program.steps.iter().filter_map(|s| if let Kernel::Op(Op::Call(f)) = s.kernel { Some(f) } else { None })
}

impl Engine for CpuEngine {
    fn coarse(&self) -> Option<&dyn Engine> {
        self.coarse.as_deref().map(|e| e as &dyn Engine)
    }

    fn parallel(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        self.machine.pool.for_each(count, task);
    }

    fn add_product(&self, a: MatView<'_>, b: MatView<'_>, factor: f64, out: &mut [f64], stride: usize) {
        fn view(m: MatView<'_>) -> MatRef<'_, f64> {
            MatRef::strided(m.data, m.rows, m.cols, m.strides.0, m.strides.1)
        }
        crate::cpu::add_product(&self.machine.pool, view(a), view(b), factor, out, stride);
    }

    fn prepare(
        &self,
        module: &Module,
        func: &Func,
        weights: &dyn WeightSource,
    ) -> Result<Box<dyn Prepared>, EngineError> {
        Ok(Box::new(self.load(module, func, weights)?))
    }
}

/// A program with its constants.
pub struct Loaded {
    machine: Arc<Machine>,
    program: Arc<Program>,
    consts: Vec<Constant>,
    calls: HashMap<FuncId, Loaded>,
}

impl Loaded {
    /// The program.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Bytes that the constants take in memory.
    pub fn bytes(&self) -> usize {
        self.consts.iter().map(Constant::bytes).sum::<usize>()
            + self.calls.values().map(Loaded::bytes).sum::<usize>()
    }

    /// Runs with tensors and caches as arguments. A cache stands for the `past` operand of a `cache_append`: new rows
    /// are written into it, and the result that would be the longer cache comes back empty.
    ///
    /// # Errors
    /// If an argument does not fit its parameter, or a cache is full.
    pub fn run_inputs(&self, args: &mut [Input<'_>]) -> Result<Vec<Tensor>, EngineError> {
        exec::run(self, args, None)
    }

    /// As [`Loaded::run_inputs`], with an eye on every step.
    ///
    /// # Errors
    /// As [`Loaded::run_inputs`], and what `watch` says.
    pub fn run_watched(
        &self,
        args: &mut [Input<'_>],
        watch: &mut dyn Watch,
    ) -> Result<Vec<Tensor>, EngineError> {
        exec::run(self, args, Some(watch))
    }
}

impl Prepared for Loaded {
    fn run(&self, args: &[&Tensor]) -> Result<Vec<Tensor>, EngineError> {
        let mut inputs: Vec<Input<'_>> = args.iter().map(|t| Input::Tensor(t)).collect();
        self.run_inputs(&mut inputs)
    }
}
