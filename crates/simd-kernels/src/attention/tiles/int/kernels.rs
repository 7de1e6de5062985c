//! The kernels, written once for both kinds of registers.

/// The kernels of a module that has vectors of rows (`LANES`, `Floats`, `Ints`), `STEP` and the
/// operations named below, with its target features. A macro, since no generic function has the
/// target features of its parameters.
macro_rules! kernels {
    ($features:literal, $name:literal) => {
        const fn kernel<const VNNI: u8>() -> Kernel {
            Kernel {
                lanes: LANES,
                keys: STEP,
                step: [step::<VNNI, 1>, step::<VNNI, 2>, step::<VNNI, 3>],
            }
        }

        /// A tile of keys for V vectors of rows.
        #[target_feature(enable = $features)]
        fn step<const VNNI: u8, const V: usize>(
            group: &mut Group<'_>,
            tile: &IntTile<'_>,
            seen: Seen,
            room: &mut Room<'_>,
        ) {
            #[cfg(test)]
            crate::isa::witness::record($name);
            let q = rows::<_, V>(group.q);
            for key in (seen.start..seen.end).step_by(STEP) {
                room.ask_ahead();
                let keys = &tile.keys[key / BLOCK * q.len()..][..q.len()];
                let sums = products::<VNNI, V>(keys, key % BLOCK / STEP, q);
                let scores = &mut rows_mut::<_, V>(room.scores)[key..];
                for ((sums, scale), scores) in sums.iter().zip(&tile.key_scales[key..]).zip(scores)
                {
                    for (sum, score) in sums.iter().zip(scores) {
                        store(score, mul(floats(*sum), set(*scale)));
                    }
                }
            }

            let soften = if seen.masked { soften::<V, true> } else { soften::<V, false> };
            let factors: [_; V] = std::array::from_fn(|v| soften(v, group, tile, seen, room));

            let weights = &rows::<_, V>(room.weights)[seen.start / 2..seen.end / 2];
            for (n, acc) in rows_mut::<_, V>(group.acc).chunks_exact_mut(STEP).enumerate() {
                let values =
                    &tile.values[n * STEP / BLOCK * KEY_TILE / 2..][seen.start / 2..seen.end / 2];
                let sums = products::<VNNI, V>(values, n % (BLOCK / STEP), weights);
                for (sums, acc) in sums.iter().zip(acc) {
                    for ((sum, acc), [before, step]) in sums.iter().zip(acc).zip(factors) {
                        store(acc, fmadd(floats(*sum), step, mul(load(acc), before)));
                    }
                }
            }
        }

        /// sums[j][v] = Σ x[i][STEP * part + j] · y[i][v] over i: in each lane the dot product of
        /// two int16.
        #[target_feature(enable = $features)]
        fn products<const VNNI: u8, const V: usize>(
            x: &[[Pair; BLOCK]],
            part: usize,
            y: &[[[Pair; LANES]; V]],
        ) -> [[Ints; V]; STEP] {
            assert!(
                x.len() == y.len() && part < BLOCK / STEP,
                "{} pairs meet {}, part {part}",
                x.len(),
                y.len()
            );
            let mut sums = [[ints(0); V]; STEP];
            for (x, y) in x.iter().zip(y) {
                let y = y.each_ref().map(|y| load_ints(y));
                for (x, sums) in x.as_chunks::<STEP>().0[part].iter().zip(&mut sums) {
                    let x = ints(*x);
                    for (sum, y) in sums.iter_mut().zip(y) {
                        add_pairs::<VNNI>(sum, x, y);
                    }
                }
            }
            sums
        }

        /// One step of the online softmax of vector `v`: scores, still to be multiplied by the
        /// scales of their rows, become weights e^(x − m) times the scales of their values, as
        /// pairs of codes; maxima and sums move on. With `MASKED`, what a row does not see weighs
        /// nothing.
        ///
        /// Returns the factors e^(old m − m) for what the rows gathered before, and the steps of
        /// the codes.
        #[inline]
        #[target_feature(enable = $features)]
        fn soften<const V: usize, const MASKED: bool>(
            v: usize,
            group: &mut Group<'_>,
            tile: &IntTile<'_>,
            seen: Seen,
            room: &mut Room<'_>,
        ) -> [Floats; 2] {
            let scores = &mut rows_mut::<_, V>(room.scores)[seen.start..seen.end];
            let floor = set(f32::NEG_INFINITY);
            if MASKED {
                let limits = load_ints(&rows::<_, V>(group.limits)[0][v]);
                for (key, scores) in (seen.start..).zip(&mut *scores) {
                    let position = ints((tile.positions.start + key) as i32);
                    let shown = if key < tile.skip {
                        floor
                    } else {
                        where_greater(limits, position, load(&scores[v]), floor)
                    };
                    store(&mut scores[v], shown);
                }
            }
            let mut most = [floor; 4];
            for scores in scores.as_chunks::<4>().0 {
                for (most, score) in most.iter_mut().zip(scores) {
                    *most = max(load(&score[v]), *most);
                }
            }
            let most = max(max(most[0], most[1]), max(most[2], most[3]));
            let (scale, log2_e) = (load(&rows::<_, V>(group.scales)[0][v]), set(LOG2_E));
            let maximum = &mut rows_mut::<_, V>(group.max)[0][v];
            let old = load(maximum);
            // The second one of two wins if one is NaN, here and below.
            let new = max(mul(most, scale), old);
            store(maximum, new);
            let m = mul(max(new, set(LEAST_MAX)), log2_e);
            // Rounded as m is, so that it is 1 where the maximum stays.
            let factor = pow2(sub(mul(old, log2_e), m));

            let scale = mul(scale, log2_e);
            let [mut sum, mut total, mut most] = [set(0.0); 3];
            for (score, value_scale) in scores.iter_mut().zip(&tile.value_scales[seen.start..]) {
                let x = load(&score[v]);
                let mut p = pow2(fmsub(x, scale, m));
                let mut scaled = mul(p, set(*value_scale));
                if MASKED {
                    // A value that a row does not see may be NaN; one that is seen must show,
                    // however little it weighs.
                    [p, scaled] = unless_equal(x, floor, [p, scaled]);
                }
                sum = add(sum, p);
                total = add(total, scaled);
                most = max(most, scaled);
                store(&mut score[v], scaled);
            }
            let before = &mut rows_mut::<_, V>(group.sum)[0][v];
            store(before, fmadd(load(before), factor, sum));

            // NaN is in the total if it is anywhere, and is passed on.
            let one = div(most, set(WEIGHT));
            let step = max(one, div(total, set(WEIGHTS)));
            let inverse = unless_less(step, set(LEAST_STEP), div(set(1.0), step));
            let round = set(ROUND);
            let weights = &mut rows_mut::<_, V>(room.weights)[seen.start / 2..];
            for (weights, [first, second]) in weights.iter_mut().zip(scores.as_chunks::<2>().0) {
                let [low, high] = [first, second].map(|x| fmadd(load(&x[v]), inverse, round));
                store_low_halves(&mut weights[v], low, high);
            }
            [factor, step]
        }

        fn rows<T, const V: usize>(x: &[T]) -> &[[[T; LANES]; V]] {
            x.as_chunks().0.as_chunks().0
        }

        fn rows_mut<T, const V: usize>(x: &mut [T]) -> &mut [[[T; LANES]; V]] {
            x.as_chunks_mut().0.as_chunks_mut().0
        }
    };
}
pub(super) use kernels;
