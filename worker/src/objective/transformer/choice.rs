//! Choice of the next token from what a network predicts.

/// Rule by which tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Choice {
    /// Divisor of the logits: 0 always takes the most likely token, 1 draws as the network predicts.
    pub temperature: f64,
    /// Number of most likely tokens that are drawn from.
    pub top_k: Option<usize>,
    /// Share of the probability whose most likely tokens are drawn from (Holtzman et al., 2020).
    pub top_p: f64,
}

/// As the network predicts.
pub(super) const PLAIN: Choice = Choice { temperature: 1.0, top_k: None, top_p: 1.0 };

impl Choice {
    /// Returns the token for a draw of U[0, 1).
    pub(crate) fn token(&self, logits: &[f32], draw: f64) -> usize {
        // By falling logits, equal ones by number: an order that nothing else decides.
        let mut order: Vec<usize> = (0..logits.len()).collect();
        let by_rank = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
        if self.temperature == 0.0 {
            return order.into_iter().min_by(by_rank).unwrap_or_default();
        }
        if self.top_k.is_some() || self.top_p < 1.0 {
            order.sort_unstable_by(by_rank);
            order.truncate(self.top_k.unwrap_or(usize::MAX));
        }
        let most = order.iter().map(|token| logits[*token]).fold(f32::NEG_INFINITY, f32::max);
        let weight = |token: &usize| (f64::from(logits[*token] - most) / self.temperature).exp();
        let mut weights: Vec<f64> = order.iter().map(weight).collect();
        if self.top_p < 1.0 {
            let (whole, mut sum) = (weights.iter().sum::<f64>(), 0.0);
            let kept = weights.iter().take_while(|weight| {
                let before = sum;
                sum += **weight;
                // The token that crosses the share belongs to it, so there is always one.
                before < self.top_p * whole
            });
            let kept = kept.count().max(1);
            weights.truncate(kept);
        }
        let mut rest = draw * weights.iter().sum::<f64>();
        let chosen = weights.iter().position(|weight| {
            rest -= weight;
            rest < 0.0
        });
        // Rounding may leave a little beyond the last.
        order[chosen.unwrap_or(weights.len() - 1)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [0.0, 2.0, 1.0, 2.0, -1.0];

    /// Number of times that each token is drawn, by evenly spaced draws.
    fn counts(choice: Choice) -> Vec<u32> {
        let mut counts = vec![0; LOGITS.len()];
        (0..10_000).for_each(|draw| counts[choice.token(&LOGITS, f64::from(draw) / 10_000.0)] += 1);
        counts
    }

    #[test]
    fn tokens_are_drawn_by_their_probabilities() {
        let whole: f64 = LOGITS.iter().map(|logit| f64::from(*logit).exp()).sum();
        for (count, logit) in counts(PLAIN).iter().zip(LOGITS) {
            let expected = 10_000.0 * f64::from(logit).exp() / whole;
            assert!((f64::from(*count) - expected).abs() < 2.0, "{count}, {expected}");
        }
        assert_eq!(counts(Choice { temperature: 0.0, ..PLAIN }), [0, 10_000, 0, 0, 0]);
        let cold = counts(Choice { temperature: 0.1, ..PLAIN });
        assert!(cold[1] > 4990 && cold[3] > 4990, "{cold:?}");
    }

    #[test]
    fn only_the_most_likely_tokens_are_drawn() {
        let drawn = |choice: Choice| {
            let of = |(token, count): (usize, &u32)| (*count > 0).then_some(token);
            counts(choice).iter().enumerate().filter_map(of).collect::<Vec<_>>()
        };
        let top_k = |k: usize| drawn(Choice { top_k: Some(k), ..PLAIN });
        assert_eq!((top_k(1), top_k(3), top_k(5)), (vec![1], vec![1, 2, 3], vec![0, 1, 2, 3, 4]));
        // The probabilities are 0.05, 0.39, 0.14, 0.39, 0.02.
        let top_p = |p: f64| drawn(Choice { top_p: p, ..PLAIN });
        assert_eq!((top_p(1e-9), top_p(0.5), top_p(0.8)), (vec![1], vec![1, 3], vec![1, 2, 3]));
    }
}
