//! Small line charts, drawn as SVG. The background is white, so that they can be read on any page.

use std::error::Error;
use std::ops::Range;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::prelude::*;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn Error>>;

/// Size of a panel in pixels.
const PANEL: (u32, u32) = (450, 320);
/// Blue and vermilion of Okabe and Ito, which colour-blind readers can tell apart too.
const COLOURS: [RGBColor; 2] = [RGBColor(0, 114, 178), RGBColor(213, 94, 0)];
const FONT: &str = "sans-serif";

/// Mapping from values to places on an axis.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Scale {
    /// Linear scale, from 0.
    Linear,
    Log,
}

/// Axis of a panel.
pub(crate) struct Axis {
    /// Quantity with its unit.
    pub label: String,
    pub scale: Scale,
    /// Values of the tick labels; empty for round ones.
    pub ticks: Vec<f64>,
}

/// Connected points.
#[derive(Clone)]
pub(crate) struct Line {
    /// Label in the legend; empty if there is only one line.
    pub label: String,
    pub points: Vec<(f64, f64)>,
    pub has_dots: bool,
}

/// One chart.
pub(crate) struct Panel {
    pub title: String,
    pub x: Axis,
    pub y: Axis,
    pub lines: Vec<Line>,
    /// Whiskers: an x, with the minimum and the maximum there.
    pub whiskers: Vec<(f64, f64, f64)>,
    /// Shaded range from this x on, and its label.
    pub shaded: Option<(f64, String)>,
}

/// Draws panels, two beside each other.
pub(crate) fn draw(panels: &[Panel]) -> Result<String, String> {
    let mut svg = String::new();
    draw_into(&mut svg, panels).map_err(|error| format!("the picture cannot be drawn: {error}"))?;
    Ok(svg)
}

fn draw_into(svg: &mut String, panels: &[Panel]) -> Drawn {
    let rows = panels.len().div_ceil(2);
    let size = (2 * PANEL.0, u32::try_from(rows)? * PANEL.1);
    let whole = SVGBackend::with_string(svg, size).into_drawing_area();
    whole.fill(&WHITE)?;
    for (area, panel) in whole.split_evenly((rows, 2)).iter().zip(panels) {
        panel.draw(area)?;
    }
    whole.present()?;
    Ok(())
}

impl Panel {
    fn draw(&self, area: &Area<'_>) -> Drawn {
        let points = || self.lines.iter().flat_map(|line| &line.points);
        let x = self.x.span(points().map(|point| point.0));
        let y_values = points().map(|point| point.1);
        let y = self.y.span(y_values.chain(self.whiskers.iter().flat_map(|at| [at.1, at.2])));
        let (right, low, high) = (x.ends.end, y.ends.start, y.ends.end);
        let mut chart = ChartBuilder::on(area)
            .caption(&self.title, (FONT, 18))
            .margin(12)
            .margin_right(24)
            .x_label_area_size(42)
            .y_label_area_size(58)
            .build_cartesian_2d(x, y)?;
        if let Some((from, why)) = &self.shaded {
            let shade = [(*from, high), (right, low)];
            chart.draw_series([Rectangle::new(shade, RGBColor(236, 236, 236).filled())])?;
            chart.draw_series([Text::new(format!(" {why}"), (*from, high), (FONT, 14))])?;
        }
        chart
            .configure_mesh()
            .bold_line_style(BLACK.mix(0.12))
            .light_line_style(TRANSPARENT)
            .x_desc(&self.x.label)
            .y_desc(&self.y.label)
            .axis_desc_style((FONT, 16))
            .label_style((FONT, 15))
            .draw()?;
        for (x, least, most) in &self.whiskers {
            chart.draw_series([PathElement::new([(*x, *least), (*x, *most)], BLACK.mix(0.5))])?;
        }
        for (line, colour) in self.lines.iter().zip(COLOURS) {
            let points = line.points.iter().copied();
            let dots = points.clone().filter(|_| line.has_dots);
            let drawn = chart.draw_series(LineSeries::new(points, colour.stroke_width(2)))?;
            if !line.label.is_empty() {
                let sample = move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2));
                drawn.label(&line.label).legend(sample);
            }
            chart.draw_series(dots.map(|at| Circle::new(at, 3, colour.filled())))?;
        }
        if self.lines.iter().any(|line| !line.label.is_empty()) {
            let mut legend = chart.configure_series_labels();
            legend.position(SeriesLabelPosition::LowerRight).label_font((FONT, 15)).draw()?;
        }
        Ok(())
    }
}

/// Range of an axis, with its ticks.
struct Span {
    scale: Scale,
    ends: Range<f64>,
    ticks: Vec<f64>,
}

impl Axis {
    fn span(&self, values: impl Iterator<Item = f64>) -> Span {
        let values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
        let least = values.iter().copied().fold(f64::INFINITY, f64::min);
        let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let ends = match self.scale {
            _ if values.is_empty() => 0.5..1.0,
            Scale::Linear => 0.0..(1.1 * most).max(f64::MIN_POSITIVE),
            Scale::Log => {
                let margin = (most / least).powf(0.08) * 1.05;
                least / margin..most * margin
            }
        };
        let ticks = if self.ticks.is_empty() { self.scale.ticks(&ends) } else { self.ticks.clone() };
        Span { scale: self.scale, ends, ticks }
    }
}

impl Scale {
    /// Returns round values between two: 1, 2 or 5 times a power of ten.
    fn ticks(self, ends: &Range<f64>) -> Vec<f64> {
        let decades = (-3..9).map(|exponent| 10.0_f64.powi(exponent));
        let mut rounds = decades.flat_map(|decade| [decade, 2.0 * decade, 5.0 * decade]);
        match self {
            Scale::Log => rounds.filter(|tick| ends.contains(tick)).collect(),
            Scale::Linear => {
                let step = rounds.find(|step| ends.end / step < 6.0).unwrap_or(ends.end);
                (0..6).map(|count| f64::from(count) * step).filter(|tick| ends.contains(tick)).collect()
            }
        }
    }
}

impl Ranged for Span {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    #[allow(clippy::cast_possible_truncation)] // a place in the picture
    fn map(&self, value: &f64, pixels: (i32, i32)) -> i32 {
        let share = match self.scale {
            Scale::Linear => (value - self.ends.start) / (self.ends.end - self.ends.start),
            Scale::Log => (value / self.ends.start).ln() / (self.ends.end / self.ends.start).ln(),
        };
        pixels.0 + (share * f64::from(pixels.1 - pixels.0)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.ends.clone()
    }
}

impl ValueFormatter<f64> for Span {
    fn format(value: &f64) -> String {
        short(*value)
    }
}

/// Formats a number in few characters.
fn short(value: f64) -> String {
    match value {
        large if large >= 1e6 => format!("{:.1}M", large / 1e6),
        large if large >= 1e4 => format!("{:.0}k", large / 1e3),
        value => format!("{}", (value * 1e3).round() / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn panel(scale: Scale, points: &[(f64, f64)]) -> Panel {
        Panel {
            title: "a title".to_string(),
            x: Axis { label: "workers".to_string(), scale: Scale::Log, ticks: vec![1.0, 4.0] },
            y: Axis { label: "ms a step".to_string(), scale, ticks: Vec::new() },
            lines: vec![Line { label: "ours".to_string(), points: points.to_vec(), has_dots: true }],
            whiskers: vec![(1.0, 9.0, 11.0)],
            shaded: Some((2.5, "a reason".to_string())),
        }
    }

    #[test]
    fn a_picture_names_its_axes_and_has_a_dot_for_each_point() {
        let svg = draw(&[panel(Scale::Linear, &[(1.0, 10.0), (4.0, 30.0)])]).unwrap();
        for text in ["a title", "workers", "ms a step", "ours", "a reason", "#FFFFFF"] {
            assert!(svg.contains(text), "no {text} in {svg}");
        }
        assert_eq!(svg.matches("<circle").count(), 2);
    }

    #[test]
    fn nothing_measured_is_no_panic() {
        for scale in [Scale::Linear, Scale::Log] {
            draw(&[panel(scale, &[]), panel(scale, &[(1.0, f64::NAN)])]).unwrap();
        }
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(Scale::Linear.ticks(&(0.0..23.0)), [0.0, 5.0, 10.0, 15.0, 20.0]);
        assert_eq!(Scale::Log.ticks(&(3.0..60.0)), [5.0, 10.0, 20.0, 50.0]);
        assert_eq!([0.25, 12.0, 560_000.0, 3_800_000.0].map(short), ["0.25", "12", "560k", "3.8M"]);
    }
}
