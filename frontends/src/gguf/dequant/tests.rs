use super::*;

fn values(ty: GgmlType, bytes: &[u8]) -> Vec<f32> {
    let mut out = Vec::new();
    ty.dequantize(bytes, |v| out.extend_from_slice(v));
    out
}

/// A block of zeros with some bytes set.
fn block(ty: GgmlType, set: &[(usize, u8)]) -> Vec<u8> {
    let mut b = vec![0; ty.block_bytes()];
    set.iter().for_each(|&(at, v)| b[at] = v);
    b
}

fn unhex(s: &str) -> Vec<u8> {
    (0..s.len()).step_by(2).map(|i| u8::from_str_radix(&s[i..i + 2], 16).unwrap()).collect()
}

/// `golden.txt` has a type, blocks and little-endian f32 values a line: random blocks (f16 scales between
/// 2^-9 and 8) and what `gguf.quants.dequantize` of gguf-py makes of them.
#[test]
fn random_blocks_equal_those_of_gguf_py_bit_for_bit() {
    let mut seen = 0;
    for line in include_str!("golden.txt").lines() {
        let parts: Vec<&str> = line.split(' ').collect();
        let (_, ty) = READ.into_iter().find(|(_, t)| t.to_string() == parts[0]).unwrap();
        let got: Vec<u8> = values(ty, &unhex(parts[1])).iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(got, unhex(parts[2]), "{ty}");
        seen += 1;
    }
    assert_eq!(seen, 8);
}

// 0x3800 is 0.5 in half precision, 0x3c00 is 1, 0x4000 is 2, 0xbc00 is -1.

#[test]
fn floats_are_widened() {
    assert_eq!(values(F32, &1.5f32.to_le_bytes()), [1.5]);
    assert_eq!(values(F16, &[0x00, 0x38, 0x00, 0xbc]), [0.5, -1.0]);
    assert_eq!(values(BF16, &[0xc0, 0x3f]), [1.5]);
}

#[test]
fn four_bits() {
    // Byte 2 has codes 3 and 15: elements 0 and 16.
    let y = values(Q4_0, &block(Q4_0, &[(1, 0x38), (2, 0xf3)]));
    assert_eq!((y[0], y[16], y[1]), (-2.5, 3.5, -4.0));
    let y = values(Q4_1, &block(Q4_1, &[(1, 0x38), (3, 0xbc), (19, 0x21)]));
    assert_eq!((y[15], y[31], y[0]), (-0.5, 0.0, -1.0));
}

#[test]
fn five_bits() {
    // The fifth bits of elements 1 and 17 are bits 1 and 17 of the four bytes before the codes.
    let y = values(Q5_0, &block(Q5_0, &[(1, 0x38), (2, 2), (7, 0x43)]));
    assert_eq!((y[1], y[17], y[0]), (1.5, -6.0, -8.0));
    let y = values(Q5_1, &block(Q5_1, &[(1, 0x38), (3, 0xbc), (6, 2), (9, 0x43)]));
    assert_eq!((y[1], y[17], y[0]), (0.5, 9.0, -1.0));
}

#[test]
fn eight_bits() {
    let y = values(Q8_0, &block(Q8_0, &[(1, 0x38), (2, 0x80), (33, 0x7f)]));
    assert_eq!((y[0], y[31], y[1]), (-64.0, 63.5, 0.0));
}

#[test]
fn k_groups_have_their_own_scale_and_minimum() {
    // d = 1, dmin = 2. Group 0: scale 3, minimum 5. Group 5: scale 1 + 48, minimum 2 + 16.
    let scales = [(1, 0x3c), (3, 0x40), (4, 3), (8, 5), (13, 0x21), (5, 0xc0), (9, 0x40)];
    let y = values(Q4_K, &block(Q4_K, &[&scales[..], &[(16, 0x04), (16 + 64 + 31, 0x70)]].concat()));
    assert_eq!((y[0], y[1], y[32 * 5 + 31], y[32 * 5]), (3.0 * 4.0 - 10.0, -10.0, 49.0 * 7.0 - 36.0, -36.0));
    // The fifth bit of group j is bit j of the byte of its element.
    let codes = [(48, 0x04), (48 + 64 + 31, 0x70), (16, 1), (16 + 31, 0x20)];
    let y = values(Q5_K, &block(Q5_K, &[&scales[..], &codes].concat()));
    assert_eq!((y[0], y[1], y[32 * 5 + 31]), (3.0 * 20.0 - 10.0, -10.0, 49.0 * 23.0 - 36.0));
}

#[test]
fn six_bits() {
    // d = 0.5. Element 0: low 5, top 2 (code 37), scale 3. Element 127: low 9, top 1 (code 25), scale -2.
    // Element 128: the second half starts; code 0, scale 1.
    let set =
        [(209, 0x38), (0, 0x05), (128, 2), (192, 3), (63, 0x90), (128 + 31, 0x40), (199, 0xfe), (200, 1)];
    let y = values(Q6_K, &block(Q6_K, &set));
    assert_eq!((y[0], y[127], y[128]), (0.5 * 3.0 * 5.0, 0.5 * -2.0 * -7.0, -16.0));
}

#[test]
fn types_that_are_not_read_are_named() {
    for (id, ty) in READ {
        assert_eq!(GgmlType::from_id(id), Ok(ty));
        assert!(ty.block_bytes() <= 210 && ty.is_quantized() == !matches!(ty, F32 | F16 | BF16));
    }
    assert!(GgmlType::from_id(17).unwrap_err().contains("IQ2_XS (ggml type 17)"));
    assert!(
        GgmlType::from_id(10)
            .unwrap_err()
            .contains("Q2_K (ggml type 10), which is not read; read are F32, F16")
    );
    assert!(GgmlType::from_id(4711).unwrap_err().contains("4711, which is not known"));
}
