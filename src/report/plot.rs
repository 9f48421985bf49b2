//! Draws the curves of one metric as inline SVG, whose colours the page's style sheet sets.

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::prelude::*;

use super::curve::{Curve, Point};

/// The size that is drawn at. The page shows a quarter of it, so that whole pixels are fine steps.
const SIZE: (u32, u32) = (1360, 720);

/// Stand-ins for colours, which the style sheet replaces: grid, text, and the first of the runs.
const GRID: RGBColor = RGBColor(0, 0, 1);
const TEXT: RGBColor = RGBColor(0, 0, 2);

/// The most runs with a colour of their own.
pub const COLOURS: usize = 8;

/// The stand-in for the colour of a run: `#000100` to `#000800`, or `#010100` for its faint line.
fn colour(run: usize, faint: bool) -> RGBColor {
    RGBColor(u8::from(faint), (run % COLOURS) as u8 + 1, 0)
}

/// The curves of runs over one another, each with its place among the runs; empty if none has a point.
#[must_use]
pub fn draw(curves: &[(usize, &Curve)]) -> String {
    let extents: Vec<[Point; 2]> = curves.iter().filter_map(|(_, curve)| curve.extent()).collect();
    let Some(range) =
        extents.into_iter().reduce(|[a, b], [c, d]| [(a.0.min(c.0), a.1.min(c.1)), (b.0.max(d.0), b.1.max(d.1))])
    else {
        return String::new();
    };
    let mut svg = String::new();
    draw_into(&mut svg, range, curves).expect("a string takes all");
    svg
}

type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

fn draw_into(svg: &mut String, [low, high]: [Point; 2], curves: &[(usize, &Curve)]) -> Drawn {
    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let label = ("sans-serif", 52).into_font().color(&TEXT);
    let mut chart = ChartBuilder::on(&area)
        .margin(24)
        .margin_right(40)
        .x_label_area_size(76)
        .y_label_area_size(176)
        .build_cartesian_2d(Axis::of(low.0, high.0, false), Axis::of(low.1, high.1, true))?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID.stroke_width(3))
        .axis_style(TRANSPARENT)
        .x_labels(5)
        .y_labels(5)
        .label_style(label)
        .set_tick_mark_size(LabelAreaPosition::Bottom, 0)
        .set_tick_mark_size(LabelAreaPosition::Left, 14)
        .draw()?;
    for (run, curve) in curves {
        let (line, smooth) = (curve.line(), curve.smooth());
        if let [(x, y)] = line[..] {
            chart.draw_series([Circle::new((x, y), 10, colour(*run, false).filled())])?;
        }
        let width = if smooth.is_empty() { 7 } else { 4 };
        chart.draw_series(LineSeries::new(line, colour(*run, !smooth.is_empty()).stroke_width(width)))?;
        if !smooth.is_empty() {
            chart.draw_series(LineSeries::new(smooth, colour(*run, false).stroke_width(8)))?;
        }
    }
    area.present()
}

/// A linear axis with labels that stay short.
struct Axis {
    from: f64,
    to: f64,
}

impl Axis {
    fn of(low: f64, high: f64, padded: bool) -> Self {
        let span = if high > low { high - low } else { low.abs().max(1.0) };
        let pad = match (padded, high > low) {
            (true, true) => 0.06 * span,
            (_, false) => 0.5 * span,
            (false, true) => 0.0,
        };
        Self { from: low - pad, to: high + pad }
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let share = (value - self.from) / (self.to - self.from);
        limit.0 + (share * f64::from(limit.1 - limit.0)).round() as i32
    }

    /// Multiples of 1, 2 or 5 times a power of ten.
    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() {
            return Vec::new(); // the grid has no finer lines
        }
        let rough = (self.to - self.from) / hint.bold_points().max(1) as f64;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|times| times * power).into_iter().find(|step| *step >= rough);
        let step = step.unwrap_or(10.0 * power);
        let (first, last) = ((self.from / step).ceil() as i64, (self.to / step).floor() as i64);
        (first..=last).map(|multiple| multiple as f64 * step).collect()
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.from..self.to
    }
}

impl ValueFormatter<f64> for Axis {
    fn format(value: &f64) -> String {
        number(*value)
    }
}

/// A number with four digits that matter, short enough for a label.
#[must_use]
pub fn number(value: f64) -> String {
    let size = value.abs();
    let (scaled, unit) = match size {
        _ if size >= 1e13 => return format!("{value:.2e}"),
        _ if size >= 9.9995e8 => (value / 1e9, "G"),
        _ if size >= 9.9995e5 => (value / 1e6, "M"),
        _ if size >= 1e4 => (value / 1e3, "k"),
        _ if size > 0.0 && size < 1e-3 => return short_exponent(value),
        _ => (value, ""),
    };
    let digits = match scaled.abs() {
        size if size >= 1000.0 => 0,
        size if size >= 100.0 => 1,
        size if size >= 10.0 => 2,
        size if size >= 1.0 => 3,
        _ => 4,
    };
    trim(&format!("{scaled:.digits$}")).to_owned() + unit
}

fn short_exponent(value: f64) -> String {
    let text = format!("{value:.2e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    format!("{}e{exponent}", trim(mantissa))
}

/// Without zeros at the end of a fraction, and without the sign of a zero.
fn trim(text: &str) -> &str {
    let short = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { text };
    if short == "-0" { "0" } else { short }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_keep_what_matters() {
        let cases = [
            (0.0, "0"),
            (-0.00001, "-1e-5"),
            (3.24159, "3.242"),
            (0.5, "0.5"),
            (150.0, "150"),
            (1234.5, "1234"),
            (12_345.0, "12.35k"),
            (1_500_000.0, "1.5M"),
            (2e-4, "2e-4"),
            (-2.5, "-2.5"),
            (1e15, "1.00e15"),
        ];
        for (value, want) in cases {
            assert_eq!(number(value), want);
        }
    }

    #[test]
    fn a_plot_has_a_line_per_run_whose_colours_the_style_sheet_sets() {
        let mut curve = Curve::default();
        (0..10).for_each(|x| curve.add(f64::from(x), f64::from(x * x)));
        let svg = draw(&[(0, &curve), (1, &curve)]);
        for part in ["stroke=\"#000100\"", "stroke=\"#000200\"", "fill=\"#000002\"", "viewBox=\"0 0 1360 720\""] {
            assert!(svg.contains(part), "{part}: {svg}");
        }
        assert!(!svg.contains("#010100"), "no faint line beside the one that has all points");
        (10..100).for_each(|x| curve.add(f64::from(x), f64::from(x % 5)));
        assert!(draw(&[(0, &curve)]).contains("stroke=\"#010100\""));
        assert_eq!(draw(&[(0, &Curve::default())]), "");
    }

    #[test]
    fn one_point_and_a_constant_are_drawn_too() {
        let mut curve = Curve::default();
        curve.add(1.0, 0.0);
        assert!(draw(&[(0, &curve)]).contains("<circle"));
        curve.add(2.0, 0.0);
        let svg = draw(&[(0, &curve)]);
        assert!(svg.contains("<polyline") && !svg.contains("NaN"), "{svg}");
    }
}
