use super::*;

/// Page tables of sequences.
fn tables(t: &Table, all: &[Sequence]) -> Vec<Vec<u32>> {
    let parts: Vec<(Sequence, usize)> = all.iter().map(|&s| (s, 0)).collect();
    t.segments(&parts).list().iter().map(|s| s.pages.to_vec()).collect()
}

fn tokens(pages: usize, first: u32) -> Vec<u32> {
    (0..(pages * PAGE) as u32).map(|i| first + i).collect()
}

#[test]
fn pages_grow_and_are_used_again() {
    let mut t = Table::new(4);
    let (a, b) = (t.add(), t.add());
    assert_eq!(t.extend(&[(a, PAGE + 1), (b, 2)]).unwrap(), []);
    assert_eq!((t.pages(), t.used(), t.len(a), t.len(b)), (3, 3, PAGE + 1, 2));
    let segments = t.segments(&[(b, 2), (a, 1)]);
    let [x, y] = segments.list() else { panic!() };
    assert_eq!((x.first, x.rows, x.past, y.first, y.rows, y.past), (0, 2, 0, 2, 1, PAGE));
    assert!(segments.new_positions().eq([0, 1, PAGE as i32]) && segments.furthest() == PAGE as i32);
    t.truncate(a, PAGE);
    t.remove(b);
    assert_eq!((t.pages(), t.used(), t.len(b)), (3, 1, 0));
    let c = t.add();
    t.extend(&[(c, 3 * PAGE)]).unwrap();
    assert_eq!((t.pages(), t.used()), (4, 4));
    // A run that does not fit changes nothing.
    let before = tables(&t, &[a, c]);
    let fault = t.extend(&[(c, 0), (a, 1)]).unwrap_err().to_string();
    let said = "2 sequences hold 256 positions, and 1 more do not fit its 4 pages of 64; let a sequence go";
    assert!(fault.contains(said), "{fault}");
    assert_eq!((tables(&t, &[a, c]), t.len(a), t.len(c)), (before, PAGE, 3 * PAGE));
    assert!(t.extend(&[(b, 1)]).is_err(), "a sequence that was let go");
    t.remove(a);
    t.extend(&[(c, 1)]).unwrap();
    t.remove(c);
    assert!(t.is_empty() && t.used() == 0 && t.pages() == 4);
}

#[test]
fn a_shared_page_is_copied_before_it_is_written() {
    let mut t = Table::new(6);
    let a = t.add();
    t.extend(&[(a, PAGE + 5)]).unwrap();
    let (b, c) = (t.fork(a), t.fork(a));
    assert_eq!((t.used(), t.len(b)), (2, PAGE + 5));
    let shared = tables(&t, &[a])[0].clone();
    // Two of the three get copies; the last has the page for itself.
    let copies = t.extend(&[(a, 1), (b, 1), (c, 1)]).unwrap();
    let now = tables(&t, &[a, b, c]);
    assert_eq!(copies, [(shared[1], now[0][1]), (shared[1], now[1][1])]);
    assert_eq!(now[2], shared);
    assert!(now.iter().all(|p| p[0] == shared[0]) && t.used() == 4);
    // Whole pages stay shared, and go when the last sequence does.
    t.remove(a);
    t.remove(c);
    assert_eq!(t.used(), 2);
    // An end at the edge of a page writes to a new one.
    t.truncate(b, PAGE);
    let d = t.fork(b);
    assert_eq!(t.extend(&[(b, 1), (d, 1)]).unwrap(), []);
    assert_eq!((t.used(), tables(&t, &[b, d])[1][0]), (3, shared[0]));
}

#[test]
fn what_a_page_holds_is_known_until_it_is_used_again() {
    let mut t = Table::new(4);
    let text = tokens(3, 0);
    let a = t.add();
    t.extend(&[(a, 2 * PAGE + 9)]).unwrap();
    t.know(a, &text[..2 * PAGE + 9]);
    assert_eq!(t.known(&text), 2 * PAGE);
    assert_eq!(t.known(&text[..2 * PAGE - 1]), PAGE);
    assert_eq!(t.known(&text[PAGE..]), 0, "the same tokens behind others");
    let b = t.take_over(&text);
    assert_eq!(tables(&t, &[b])[0], tables(&t, &[a])[0][..2]);
    t.remove(a);
    t.remove(b);
    assert_eq!((t.used(), t.known(&text)), (0, 2 * PAGE));
    // Pages of nothing known go first, then those at the end of what was let go first.
    let c = t.add();
    t.extend(&[(c, 2 * PAGE)]).unwrap();
    assert_eq!(t.known(&text), 2 * PAGE);
    t.extend(&[(c, 1)]).unwrap();
    assert_eq!(t.known(&text), PAGE);
    // What is written to is no longer what it was.
    let d = t.take_over(&text[..PAGE]);
    t.truncate(d, PAGE - 1);
    t.extend(&[(d, 1)]).unwrap();
    assert_eq!((t.known(&text), t.used()), (0, 4));
    // Equal pages that were computed twice are known once, and what follows on them is found.
    t.remove(c);
    t.remove(d);
    let mut twice = Table::new(9);
    let (e, f) = (twice.add(), twice.add());
    twice.extend(&[(e, PAGE), (f, 2 * PAGE)]).unwrap();
    twice.know(e, &text[..PAGE]);
    twice.know(f, &text[..2 * PAGE]);
    let (e, f, g) = (tables(&twice, &[e]), tables(&twice, &[f]), twice.take_over(&text));
    assert_eq!(tables(&twice, &[g])[0], [e[0][0], f[0][1]]);
}
