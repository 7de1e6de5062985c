//! Two kinds of charts as SVG: groups of bars with a limit above each, and lines.

use std::fmt::Write as _;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 56.0;
const BOTTOM: f64 = 44.0;
/// Colours that differ in brightness too.
const COLOURS: [&str; 5] = ["#2f6fb0", "#e08a2e", "#4f9d69", "#8c5fa8", "#777777"];

/// A bar: its height, and where its limit lies, if it has one.
pub type Bar = Option<(f64, Option<f64>)>;

/// A curve: its name in the legend, and its points by ascending x.
pub type Line = (String, Vec<(f64, f64)>);

/// Bars in groups: `groups` has a name and one bar for each of `series`.
pub fn bars(title: &str, unit: &str, series: &[&str], groups: &[(&str, Vec<Bar>)]) -> String {
    let values = groups.iter().flat_map(|(_, bars)| bars).flatten();
    let top =
        ceiling(values.map(|(value, limit)| limit.unwrap_or(0.0).max(*value)).fold(0.0, f64::max));
    let mut svg = frame(title, unit, top, series);
    let group_width = (WIDTH - LEFT - RIGHT) / groups.len().max(1) as f64;
    let bar_width = group_width * 0.8 / series.len().max(1) as f64;
    for (index, (name, bars)) in groups.iter().enumerate() {
        let start = LEFT + group_width * index as f64;
        text(&mut svg, start + group_width / 2.0, HEIGHT - BOTTOM + 18.0, "middle", name);
        for (place, (value, limit)) in
            bars.iter().enumerate().filter_map(|(place, bar)| Some((place, (*bar)?)))
        {
            let (x, y) = (start + group_width * 0.1 + bar_width * place as f64, y_of(value, top));
            let (colour, width) = (colour(place), bar_width * 0.9);
            let _ = writeln!(
                svg,
                r#"<rect x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{:.1}" fill="{colour}"/>"#,
                HEIGHT - BOTTOM - y
            );
            let label = if value < 100.0 { format!("{value:.1}") } else { format!("{value:.0}") };
            text(&mut svg, x + width / 2.0, y - 4.0, "middle", &label);
            if let Some(limit) = limit {
                let (y, end) = (y_of(limit, top), x + width);
                let _ = writeln!(
                    svg,
                    r##"<line x1="{x:.1}" y1="{y:.1}" x2="{end:.1}" y2="{y:.1}" stroke="#000" stroke-width="2" stroke-dasharray="4 2"/>"##
                );
            }
        }
    }
    svg + "</svg>\n"
}

/// Curves over a common axis, which is logarithmic to base 2: lengths double.
pub fn lines(title: &str, unit: &str, axis: &str, lines: &[Line]) -> String {
    let points = || lines.iter().flat_map(|(_, points)| points).copied();
    let top = ceiling(points().map(|(_, y)| y).fold(0.0, f64::max));
    let names: Vec<&str> = lines.iter().map(|(name, _)| name.as_str()).collect();
    let mut svg = frame(title, unit, top, &names);
    let mut marks: Vec<f64> = points().map(|(x, _)| x).collect();
    marks.sort_by(f64::total_cmp);
    marks.dedup();
    let (Some(&first), Some(&last)) = (marks.first(), marks.last()) else {
        return svg + "</svg>\n";
    };
    let span = (last / first).log2().max(f64::MIN_POSITIVE);
    let x_of = |x: f64| LEFT + 24.0 + (x / first).log2() / span * (WIDTH - LEFT - RIGHT - 48.0);
    for &mark in &marks {
        text(&mut svg, x_of(mark), HEIGHT - BOTTOM + 18.0, "middle", &format!("{mark}"));
    }
    text(&mut svg, (LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 8.0, "middle", axis);
    for (index, (_, points)) in lines.iter().enumerate() {
        let colour = colour(index);
        let path: Vec<String> =
            points.iter().map(|&(x, y)| format!("{:.1},{:.1}", x_of(x), y_of(y, top))).collect();
        let _ = writeln!(
            svg,
            r#"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="2"/>"#,
            path.join(" ")
        );
        for &(x, y) in points {
            let _ = writeln!(
                svg,
                r#"<circle cx="{:.1}" cy="{:.1}" r="3" fill="{colour}"/>"#,
                x_of(x),
                y_of(y, top)
            );
        }
    }
    svg + "</svg>\n"
}

/// The title, the legend and the vertical axis.
fn frame(title: &str, unit: &str, top: f64, series: &[&str]) -> String {
    let mut svg = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="11">
<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>
"##
    );
    let _ = writeln!(
        svg,
        r#"<text x="{LEFT}" y="18" font-size="14">{}</text>"#,
        escape(&format!("{title}, {unit}"))
    );
    let mut x = LEFT;
    for (index, name) in series.iter().enumerate() {
        let _ = writeln!(
            svg,
            r#"<rect x="{x:.1}" y="28" width="10" height="10" fill="{}"/>"#,
            colour(index)
        );
        text(&mut svg, x + 14.0, 37.0, "start", name);
        x += 30.0 + 6.5 * name.chars().count() as f64;
    }
    for step in 0..=4 {
        let value = top * f64::from(step) / 4.0;
        let (y, end) = (y_of(value, top), WIDTH - RIGHT);
        let _ = writeln!(
            svg,
            r##"<line x1="{LEFT}" y1="{y:.1}" x2="{end}" y2="{y:.1}" stroke="#ddd"/>"##
        );
        text(&mut svg, LEFT - 6.0, y + 4.0, "end", &format!("{value}"));
    }
    svg
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, text: &str) {
    let _ = writeln!(
        svg,
        r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"#,
        escape(text)
    );
}

fn y_of(value: f64, top: f64) -> f64 {
    HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)
}

fn colour(index: usize) -> &'static str {
    COLOURS[index % COLOURS.len()]
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// The next of 4, 8, 20, 40, 80, 200 … above a value: each divides into four.
fn ceiling(value: f64) -> f64 {
    let mut top = 0.04;
    for factor in [2.0, 2.5, 2.0].into_iter().cycle() {
        if top >= value * 1.05 || top > 1e12 {
            break;
        }
        top *= factor;
    }
    // What repeated factors leave behind the comma is not for labels.
    (top * 1e4).round() * 1e-4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_have_their_heights_and_limits() {
        let groups = [
            ("128 <tokens>", vec![Some((50.0, Some(100.0))), None]),
            ("512", vec![Some((75.0, None)), Some((25.0, None))]),
        ];
        let svg = bars("Prompt", "tokens/s", &["bf16", "q8"], &groups);
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"), "{svg}");
        // The background, two of the legend, three bars.
        assert_eq!((svg.matches("<rect").count(), svg.matches("stroke-dasharray").count()), (6, 1));
        assert!(svg.contains("128 &lt;tokens&gt;") && !svg.contains("<tokens>"));
        // 50 of 200 is a quarter of the 220 between the axes.
        assert!(svg.contains(r#"height="55.0""#), "{svg}");
    }

    #[test]
    fn lines_have_a_point_for_each_measurement() {
        let svg = lines(
            "Decode",
            "tokens/s",
            "context",
            &[("f16".to_owned(), vec![(128.0, 20.0), (4096.0, 10.0)])],
        );
        assert_eq!((svg.matches("<polyline").count(), svg.matches("<circle").count()), (1, 2));
        assert!(lines("Decode", "tokens/s", "context", &[]).ends_with("</svg>\n"));
    }

    #[test]
    fn the_axis_ends_above_the_highest_value_at_a_round_number() {
        let found = [0.0, 3.7, 4.0, 19.0, 21.0, 180.0, 195.0].map(ceiling);
        assert_eq!(found, [0.04, 4.0, 8.0, 20.0, 40.0, 200.0, 400.0]);
    }
}
