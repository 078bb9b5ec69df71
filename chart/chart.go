// Package chart draws curves: one Chart as SVG for pages and papers, as PNG,
// and as text for a terminal.
//
// Describe what is to be seen in a Chart, or let Curves do so from the events
// of a run or Compare from those of several, and call WriteFile, or
// Chart.SVG, Chart.PNG and Chart.Text. The same Chart always gives the same bytes.
// However many points a series has, what is drawn of it is bounded by the
// width of the picture and shows every peak of it. Values that are no numbers, or
// that a logarithmic axis has no place for, leave gaps.
//
// A Chart has panels side by side that share one legend. There are lines and
// points only, and one scale for each axis.
package chart

import (
	"fmt"
	"math"
	"strings"
)

// Chart is what is to be seen.
type Chart struct {
	Title    string
	Subtitle string
	X        string  // what the horizontal axes show, such as "round"
	Panels   []Panel // side by side
}

// Panel is a pair of axes with the series in it.
type Panel struct {
	Title   string
	Log     bool // the vertical axis is logarithmic
	Percent bool // values are fractions from 0 to 1
	Series  []Series
}

// Series is a curve. Series of one name and colour have one place in the legend, those
// without name have none.
type Series struct {
	Name   string
	X, Y   []float64 // X ascending; the shorter one counts
	Color  int       // index, from 0, into a palette that repeats with dashes
	Faint  bool      // thin and pale, as the background of another
	Marked bool      // a dot at each point
	Alone  bool      // dots without a line
}

// Pixels of a chart before scaling.
const (
	width       = 960
	plotHeight  = 270
	margin      = 28
	gap         = 44 // between panels
	tickWidth   = 46 // left of a panel for its numbers
	titleSize   = 19
	textSize    = 13
	tickSize    = 12
	legendRow   = 22
	legendLine  = 22
	maxLabel    = 60 // characters of a name, more are cut
	maxSeries   = 64 // drawn in a panel
	maxPanels   = 4
	maxReal     = 1e100
	bottomSpace = 52
)

// A point is in pixels, from the top left.
type point struct{ x, y float64 }

// ink is a colour by its role, so that a page in the dark can have another
// one: below 0 the roles, from 0 on the series.
type ink int

const (
	paper ink = -iota - 1
	grid
	axis
	muted
	words
)

type align int

const (
	left align = iota
	middle
	right
)

// A canvas draws. There are two, SVG and PNG.
type canvas interface {
	fill(at point, w, h float64, in ink)
	line(pts []point, width float64, in ink, faint, dashed bool)
	dot(at point, radius float64, in ink)
	text(at point, s string, size float64, bold bool, to align, in ink)
}

// measure returns the width of a text.
type measure func(s string, size float64, bold bool) float64

// height returns how high the chart is.
func (c *Chart) height(m measure) float64 { return c.top(m) + plotHeight + bottomSpace }

// top returns where the panels' axes begin.
func (c *Chart) top(m measure) float64 {
	y := 40.0
	if c.Subtitle != "" {
		y += 22
	}
	rows, _ := c.legend(m)
	return y + float64(len(rows)*legendRow) + 40
}

func (c *Chart) panels() []Panel { return c.Panels[:min(len(c.Panels), maxPanels)] }

func (p *Panel) series() []Series { return p.Series[:min(len(p.Series), maxSeries)] }

// legend returns the series with a name, in rows, and where each begins.
func (c *Chart) legend(m measure) (rows [][]Series, at [][]float64) {
	type key struct {
		name  string
		color int
	}
	seen := map[key]int{}
	var all []Series
	for _, p := range c.panels() {
		for _, s := range p.series() {
			if s.Name == "" {
				continue
			}
			k := key{s.Name, s.Color}
			if i, ok := seen[k]; ok {
				all[i].Alone = all[i].Alone && s.Alone
				all[i].Marked = all[i].Marked || s.Marked
				continue
			}
			seen[k] = len(all)
			all = append(all, s)
		}
	}
	x := float64(width)
	for _, s := range all {
		w := legendLine + 8 + 1.12*m(label(s.Name), textSize, false) + 22 // the font of a page may be wider
		if x+w > width-margin+22 {
			rows, at = append(rows, nil), append(at, nil)
			x = margin
		}
		last := len(rows) - 1
		rows[last], at[last] = append(rows[last], s), append(at[last], x)
		x += w
	}
	return rows, at
}

// label returns a text as it is drawn: on one line and not too long.
func label(s string) string { return clean(s, maxLabel) }

// long is label for a title, which has the width of the picture.
func long(s string) string { return clean(s, 2*maxLabel) }

// clean returns a text of at most so many characters, without those that are
// for no eye.
func clean(s string, most int) string {
	r := []rune(strings.Join(strings.Fields(strings.ToValidUTF8(s[:min(len(s), 4*most+4)], "?")), " "))
	for i := range r {
		if r[i] < ' ' || r[i] >= 0x7f && r[i] < 0xa0 || r[i] == 0xfffe || r[i] == 0xffff {
			r[i] = '?'
		}
	}
	if len(r) > most {
		r = append(r[:most-1], '…')
	}
	return string(r)
}

// draw draws the chart.
func (c *Chart) draw(on canvas, m measure) {
	on.fill(point{0, 0}, width, c.height(m), paper)
	on.text(point{margin, 40}, long(c.Title), titleSize, true, left, words)
	y := 40.0
	if c.Subtitle != "" {
		y += 22
		on.text(point{margin, y}, long(c.Subtitle), textSize, false, left, muted)
	}
	rows, at := c.legend(m)
	for i, row := range rows {
		y += legendRow
		for j, s := range row {
			x := at[i][j]
			if !s.Alone {
				on.line([]point{{x, y - 4.5}, {x + legendLine, y - 4.5}}, 2.2, ink(s.Color), false, dashed(s.Color))
			}
			if s.Marked || s.Alone {
				on.dot(point{x + legendLine/2, y - 4.5}, 3.4, ink(s.Color))
			}
			on.text(point{x + legendLine + 8, y}, label(s.Name), textSize, false, left, words)
		}
	}
	panels := c.panels()
	if len(panels) == 0 {
		return
	}
	each := (width - 2*margin - float64(len(panels)-1)*gap) / float64(len(panels))
	for i := range panels {
		x := margin + float64(i)*(each+gap)
		panels[i].draw(on, c.X, point{x + tickWidth, c.top(m)}, each-tickWidth)
	}
}

func (p *Panel) draw(on canvas, xLabel string, at point, w float64) {
	title := p.Title
	if p.Log {
		title += " (log scale)"
	}
	on.text(point{at.x - tickWidth, at.y - 16}, label(title), textSize, true, left, words)
	xs, ys, ok := p.scales(at, w)
	if !ok {
		on.line([]point{{at.x, at.y + plotHeight}, {at.x + w, at.y + plotHeight}}, 1, axis, false, false)
		on.text(point{at.x + w/2, at.y + plotHeight/2}, "no data", textSize, false, middle, muted)
		return
	}
	for _, t := range ys.ticks {
		y := crisp(ys.at(t))
		on.line([]point{{at.x, y}, {at.x + w, y}}, 1, grid, false, false)
		on.text(point{at.x - 8, ys.at(t) + 4.2}, ys.format(t, p.Percent), tickSize, false, right, muted)
	}
	base := crisp(at.y + plotHeight)
	on.line([]point{{at.x, base}, {at.x + w, base}}, 1, axis, false, false)
	for _, t := range xs.ticks {
		x := crisp(xs.at(t))
		on.line([]point{{x, base}, {x, base + 5}}, 1, axis, false, false)
		on.text(point{xs.at(t), base + 19}, xs.format(t, false), tickSize, false, middle, muted)
	}
	on.text(point{at.x + w/2, base + 38}, label(xLabel), textSize, false, middle, muted)
	for _, s := range p.series() {
		if s.Faint {
			s.draw(on, xs, ys)
		}
	}
	for _, s := range p.series() {
		if !s.Faint {
			s.draw(on, xs, ys)
		}
	}
}

// crisp returns where a line of one pixel is not blurred.
func crisp(v float64) float64 { return math.Floor(v) + 0.5 }

// dashed reports whether the palette has been used up before this colour.
func dashed(color int) bool { return color >= len(lightPalette()) }

func (s *Series) draw(on canvas, xs, ys scale) {
	thick := 2.2
	if s.Faint {
		thick = 1
	}
	for _, run := range s.runs(xs, ys) {
		drawn := reduce(run)
		switch {
		case s.Alone:
		case len(drawn) > 1:
			on.line(drawn, thick, ink(s.Color), s.Faint, dashed(s.Color))
		case !s.Marked: // a line of one point is a dot
			on.dot(drawn[0], thick, ink(s.Color))
		}
		if s.Marked || s.Alone {
			next := math.Inf(-1)
			for i, pt := range run {
				if pt.x >= next || i == len(run)-1 {
					on.dot(pt, 3.2, ink(s.Color))
					next = pt.x + 7 // dots that touch would be a thick line
				}
			}
		}
	}
}

// runs returns the points of the series in pixels, cut at gaps.
func (s *Series) runs(xs, ys scale) [][]point {
	var all [][]point
	open := false
	for i := range min(len(s.X), len(s.Y)) {
		if !xs.has(s.X[i]) || !ys.has(s.Y[i]) {
			open = false
			continue
		}
		if !open {
			all, open = append(all, nil), true
		}
		last := len(all) - 1
		all[last] = append(all[last], point{xs.at(s.X[i]), ys.at(s.Y[i])})
	}
	return all
}

// reduce leaves of the points in each column of half a pixel the first, the lowest, the
// highest and the last, which draw the same line (Jugel et al. 2014, "M4: A
// Visualization-Oriented Time Series Data Aggregation").
func reduce(pts []point) []point {
	if len(pts) < width {
		return pts
	}
	var out []point
	for start := 0; start < len(pts); {
		column := math.Floor(2 * pts[start].x)
		end, low, high := start, start, start
		for end < len(pts) && math.Floor(2*pts[end].x) == column {
			if pts[end].y < pts[low].y {
				low = end
			}
			if pts[end].y > pts[high].y {
				high = end
			}
			end++
		}
		kept := -1
		for _, i := range [4]int{start, min(low, high), max(low, high), end - 1} {
			if i != kept {
				out, kept = append(out, pts[i]), i
			}
		}
		start = end
	}
	return out
}

// Describe says in words what is drawn, for those who do not see it.
func (c *Chart) Describe() string {
	var b strings.Builder
	for _, p := range c.panels() {
		fmt.Fprintf(&b, "%s over %s. ", label(p.Title), label(c.X))
		for _, s := range p.series() {
			first, last, ok := s.ends()
			if s.Name == "" || !ok {
				continue
			}
			f := scale{step: 0.001}
			if s.Alone || first == last {
				fmt.Fprintf(&b, "%s: %s. ", label(s.Name), f.format(last, p.Percent))
			} else {
				fmt.Fprintf(&b, "%s: from %s to %s. ", label(s.Name), f.format(first, p.Percent), f.format(last, p.Percent))
			}
		}
	}
	return strings.TrimSpace(b.String())
}

// ends returns the first and the last value that is a number.
func (s *Series) ends() (first, last float64, ok bool) {
	for i := range min(len(s.X), len(s.Y)) {
		if y := s.Y[i]; real(y) {
			if !ok {
				first, ok = y, true
			}
			last = y
		}
	}
	return first, last, ok
}

// real reports whether a value has a place on an axis.
func real(v float64) bool { return math.Abs(v) <= maxReal }
