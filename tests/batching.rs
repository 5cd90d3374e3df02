//! Texts side by side: a text does not depend on what runs with it, in what parts it ran, or what was computed before.

use qrmc_lowering::artefact::Artefact;
use qrmc_runtime::batch::{Continuation, generate_many};
use qrmc_runtime::caches::{Caches, pages};
use qrmc_runtime::engine::{CpuEngine, Sequence};
use qrmc_runtime::generate::{Ending, GenerateParams, generate};
use qrmc_runtime::sample::SampleParams;
use qrmc_runtime::session::Session;

use crate::run::ok;
use crate::support::{Source, TINY, data, import};

/// Quantized in all ways that a cache and a linear layer know.
const RECIPES: [&str; 3] = [
    "rotate,place-transforms,annotate{w=4,group=row,sym=true,a=4,kv=4},rtn",
    "rtn:bits=8,group=row,sym=true,a=8,kv=8",
    "rtn:bits=4,group=64,head=8",
];
/// Quantized in its caches alone, with keys as they were before they were turned.
const KEYS: &str = "kvquant:bits=3";

fn quantized(engine: &CpuEngine, recipe: &str) -> Session {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let tiny = data(TINY);
    let args = ["compile", tiny.to_str().unwrap(), "--pass", recipe, "--no-check", "-o", "out"];
    ok(dir, &args);
    let a = Artefact::map(&dir.join("out")).unwrap();
    Session::load(engine, &a.module, &a).unwrap()
}

fn floats(engine: &CpuEngine) -> Session {
    let tiny = import(TINY);
    Session::load(engine, &tiny.module, &Source(tiny.source.weights)).unwrap()
}

/// Arbitrary tokens.
fn tokens(count: usize, seed: u64) -> Vec<u32> {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s % 4000) as u32
    };
    (0..count).map(|_| next()).collect()
}

/// Bits of the rows of a stream over these sequences.
fn stream(model: &Session, caches: &mut Caches, parts: &[(Sequence, &[u32])]) -> Vec<u32> {
    let x = model.stream(caches, parts).unwrap();
    x.as_f32().unwrap().iter().map(|x| x.to_bits()).collect()
}

/// The same of one text on its own, run in parts of these lengths.
fn alone(model: &Session, text: &[u32], parts: &[usize]) -> Vec<u32> {
    let mut caches = model.caches(pages(text.len()));
    let (s, mut rest, mut out) = (caches.add(), text, Vec::new());
    for &n in parts {
        let (part, later) = rest.split_at(n);
        out.extend(stream(model, &mut caches, &[(s, part)]));
        rest = later;
    }
    assert!(rest.is_empty());
    out
}

#[test]
fn parts_and_company_change_no_bits() {
    let engine = CpuEngine::new(2).unwrap();
    let texts = [tokens(300, 1), tokens(67, 2), tokens(130, 3)];
    for recipe in RECIPES {
        let model = quantized(&engine, recipe);
        let want = alone(&model, &texts[0], &[300]);
        for parts in [&[64, 64, 64, 64, 44][..], &[1, 2, 30, 33, 1, 100, 133], &[299, 1]] {
            assert!(alone(&model, &texts[0], parts) == want, "{recipe}: in parts of {parts:?}");
        }
        company(&model, &texts, &[[300, 0, 0], [0, 67, 130]], recipe);
        company(&model, &texts, &[[1, 2, 3], [298, 1, 100], [1, 64, 27]], recipe);
    }
    // Dense products of many rows have another order than those of few.
    let model = floats(&engine);
    for (model, what) in [(&model, "floats"), (&quantized(&engine, KEYS), KEYS)] {
        let want = alone(model, &texts[0], &[300]);
        for parts in [&[100, 200][..], &[33, 34, 233], &[64, 64, 64, 64, 44]] {
            assert!(alone(model, &texts[0], parts) == want, "{what} in parts of {parts:?}");
        }
        company(model, &texts, &[[64, 33, 40], [236, 34, 90]], what);
    }
    let few: Vec<Vec<u32>> = (0..31).map(|i| tokens(3, 40 + i)).collect();
    let mut caches = model.caches(32);
    let sequences: Vec<Sequence> = few.iter().map(|_| caches.add()).collect();
    let mut rows: Vec<Vec<u32>> = vec![Vec::new(); few.len()];
    for i in 0..3 {
        let parts: Vec<(Sequence, &[u32])> =
            sequences.iter().zip(&few).map(|(&s, text)| (s, &text[i..=i])).collect();
        let x = stream(&model, &mut caches, &parts);
        rows.iter_mut().zip(x.chunks(256)).for_each(|(all, row)| all.extend(row));
    }
    for (text, rows) in few.iter().zip(&rows) {
        assert!(alone(&model, text, &[1, 1, 1]) == *rows, "one of 31 texts of floats");
    }
}

/// Runs texts together, in steps of so many rows of each, and each alone in one run.
fn company(model: &Session, texts: &[Vec<u32>; 3], steps: &[[usize; 3]], what: &str) {
    let mut caches = model.caches(16);
    let sequences = [caches.add(), caches.add(), caches.add()];
    let (mut done, mut rows) = ([0; 3], vec![Vec::new(); 3]);
    for step in steps {
        let parts: Vec<(Sequence, &[u32])> =
            (0..3).map(|i| (sequences[i], &texts[i][done[i]..done[i] + step[i]])).collect();
        let x = stream(model, &mut caches, &parts);
        let mut at = 0;
        for i in 0..3 {
            rows[i].extend_from_slice(&x[at * 256..(at + step[i]) * 256]);
            (at, done[i]) = (at + step[i], done[i] + step[i]);
        }
    }
    for (i, (text, rows)) in texts.iter().zip(&rows).enumerate() {
        let text = &text[..done[i]];
        assert!(alone(model, text, &[text.len()]) == *rows, "{what}: text {i} beside others, {steps:?}");
    }
}

#[test]
fn what_was_computed_before_is_taken_over() {
    let engine = CpuEngine::new(2).unwrap();
    let long = tokens(400, 5);
    let models = RECIPES[..1].iter().map(|r| quantized(&engine, r)).chain([floats(&engine)]);
    for model in models.chain([quantized(&engine, KEYS)]) {
        let fresh = |text: &[u32]| model.start(&mut model.caches(pages(text.len())), text).unwrap().1;
        let mut caches = model.caches(16);
        let (first, logits) = model.start(&mut caches, &long[..330]).unwrap();
        assert!(logits == fresh(&long[..330]));
        let others = [(256, 10), (256, 100), (64, 1), (128, 0), (130, 31), (320, 33), (40, 50)];
        let texts: Vec<Vec<u32>> =
            others.iter().map(|&(n, m)| [&long[..n], &tokens(m, 6 + m as u64)].concat()).collect();
        for (i, text) in texts.iter().enumerate() {
            if i == 3 {
                // Pages outlive their sequence.
                caches.remove(first);
            }
            assert_eq!(caches.known(text), others[i].0 / 64 * 64, "text {i}");
            let (s, logits) = model.start(&mut caches, text).unwrap();
            assert!(logits == fresh(text), "text {i}");
            let bytes = caches.bytes();
            assert_eq!(caches.len(s), text.len());
            caches.remove(s);
            assert_eq!(caches.bytes(), bytes);
        }
        assert!(caches.is_empty() && caches.used_bytes() == 0);

        // Two texts go on differently from the middle of a page.
        let (a, _) = model.start(&mut caches, &long[..100]).unwrap();
        let b = caches.fork(a);
        let ends = [tokens(40, 8), tokens(40, 9)];
        let both = [a, b].map(|s| caches.len(s));
        assert_eq!(both, [100, 100]);
        for (s, end) in [a, b].into_iter().zip(&ends) {
            let logits = model.prefill(&mut caches, s, end).unwrap();
            let mut own = model.caches(3);
            let (alone, _) = model.start(&mut own, &long[..100]).unwrap();
            assert!(logits == model.prefill(&mut own, alone, end).unwrap());
        }
        let fault = model.start(&mut model.caches(2), &long[..129]).unwrap_err().to_string();
        assert!(fault.contains("the cache is full: 1 sequences hold 0 positions"), "{fault}");
        let mut full = model.caches(1);
        let (s, _) = model.start(&mut full, &long[..64]).unwrap();
        let fault = model.prefill(&mut full, s, &[1]).unwrap_err().to_string();
        assert!(fault.contains("hold 64 positions, and 1 more do not fit its 1 pages of 64"), "{fault}");
        assert_eq!(full.len(s), 64);
        let fault = model.stream(&mut caches, &[(a, &[1]), (a, &[2])]).unwrap_err().to_string();
        assert!(fault.contains("sequence 2 of a run"), "{fault}");
    }
}

#[test]
fn texts_do_not_depend_on_their_batch() {
    let engine = CpuEngine::new(2).unwrap();
    let models = RECIPES[..1].iter().map(|r| quantized(&engine, r)).chain([floats(&engine)]);
    for model in models {
        let (head, other) = (tokens(200, 11), tokens(90, 12));
        let mut prompts: Vec<Vec<u32>> = (0..38)
            .map(|i| match i % 3 {
                0 => [&head[..40 + 4 * i], &tokens(i, 50 + i as u64)].concat(),
                1 => [&other[..70], &tokens(2 * i, 90 + i as u64)].concat(),
                _ => tokens(1 + 5 * i, 130 + i as u64),
            })
            .collect();
        prompts.extend([tokens(505, 20), tokens(512, 21), tokens(600, 22)]);
        let sample = SampleParams { temperature: 1.0, top_k: 50, top_p: 0.95, seed: 3 };
        let params = GenerateParams { sample, max_new: 10, stop: (0..150).collect() };
        let want: Vec<Option<Continuation>> = prompts
            .iter()
            .map(|p| {
                let g = generate(&model, p, &params, &mut |_| true).ok()?;
                Some(Continuation { tokens: g.tokens, ending: g.ending })
            })
            .collect();
        for ending in [Ending::Stop, Ending::Length, Ending::Context] {
            assert!(want.iter().flatten().any(|c| c.ending == ending), "no text ends by {ending:?}");
        }
        let least = model.buffer_bytes(512) + 8 * model.page_bytes();
        for (memory, backwards) in [(u64::MAX, false), (least, false), (u64::MAX, true), (least, true)] {
            let mut order: Vec<usize> = (0..prompts.len()).collect();
            if backwards {
                order.reverse();
            }
            let asked: Vec<Vec<u32>> = order.iter().map(|&i| prompts[i].clone()).collect();
            let mut told = vec![0; asked.len()];
            let all = generate_many(&model, &asked, &params, memory, &mut |i, _| told[i] += 1).unwrap();
            assert!(told.iter().all(|&n| n == 1));
            for (have, &i) in all.iter().zip(&order) {
                let none = Continuation { tokens: Vec::new(), ending: Ending::Context };
                assert_eq!(*have, want[i].clone().unwrap_or(none), "prompt {i}, {memory} bytes");
            }
        }
        let fault = generate_many(&model, &prompts, &params, least - 1, &mut |_, _| {}).unwrap_err();
        assert!(fault.to_string().contains("prompt 39 of 505 tokens needs"), "{fault}");
        let none = generate_many(&model, &[vec![]], &params, least, &mut |_, _| {}).unwrap_err();
        assert!(none.to_string().contains("prompt 1 has no tokens"));
    }
}
