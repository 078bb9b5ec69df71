package chart

import (
	"math"
	"strconv"
	"strings"
)

// scale maps values to pixels.
type scale struct {
	low, high float64 // values
	from, to  float64 // pixels
	log       bool
	ticks     []float64
	step      float64 // between ticks that are in equal steps
}

func (s scale) has(v float64) bool { return real(v) && (!s.log || v > 0) }

func (s scale) at(v float64) float64 {
	low, high := s.low, s.high
	if s.log {
		low, high, v = math.Log10(low), math.Log10(high), math.Log10(v)
	}
	return s.from + (v-low)/(high-low)*(s.to-s.from)
}

// value is the inverse of at.
func (s scale) value(pixel float64) float64 {
	f := (pixel - s.from) / (s.to - s.from)
	if s.log {
		return s.low * math.Pow(s.high/s.low, f)
	}
	return s.low + f*(s.high-s.low)
}

// scales returns the scales of a panel; ok is false if it has no points.
func (p *Panel) scales(at point, w float64) (xs, ys scale, ok bool) {
	xLow, xHigh, yLow, yHigh := math.Inf(1), math.Inf(-1), math.Inf(1), math.Inf(-1)
	for _, s := range p.series() {
		for i := range min(len(s.X), len(s.Y)) {
			if x, y := s.X[i], s.Y[i]; real(x) && real(y) && (!p.Log || y > 0) {
				xLow, xHigh = min(xLow, x), max(xHigh, x)
				yLow, yHigh = min(yLow, y), max(yHigh, y)
			}
		}
	}
	if xLow > xHigh {
		return xs, ys, false
	}
	if xLow > 0 && xLow <= xHigh/2 || xLow == xHigh && xLow > 0 {
		xLow = 0
	}
	xs = linear(xLow, xHigh, 6, 1)
	xs.low, xs.high = xLow, xHigh // the curve ends where the axis does
	if xs.low == xs.high {
		xs.high++
	}
	xs.from, xs.to = at.x, at.x+w
	xs.ticks = within(xs.ticks, xs.low, xs.high)
	if p.Log {
		ys = logarithmic(yLow, yHigh)
	} else {
		ys = linear(yLow, yHigh, 5, 0)
		if p.Percent && yLow >= 0 && yHigh <= 1 {
			ys.low, ys.high = max(ys.low, 0), min(ys.high, 1)
			ys.ticks = within(ys.ticks, ys.low, ys.high)
		}
	}
	ys.from, ys.to = at.y+plotHeight, at.y
	return xs, ys, true
}

// linear returns a scale that holds low to high, with about n ticks at 1, 2 or
// 5 times a power of ten, at least least apart.
func linear(low, high float64, n int, least float64) scale {
	if d := high - low; d < 1e-200 || d < 1e-9*max(math.Abs(low), math.Abs(high)) { // as good as one value
		pad := max(math.Abs(low)/10, 1e-3)
		low, high = low-pad, high+pad
	}
	raw := (high - low) / float64(n)
	step := math.Pow(10, math.Floor(math.Log10(raw)))
	switch f := raw / step; {
	case f > 5:
		step *= 10
	case f > 2:
		step *= 5
	case f > 1:
		step *= 2
	}
	step = max(step, least)
	s := scale{low: math.Floor(low/step) * step, high: math.Ceil(high/step) * step, step: step}
	first := math.Floor(low / step)
	for i := 0; i <= 3*n; i++ {
		t := (first + float64(i)) * step
		if t > s.high+step/2 {
			break
		}
		s.ticks = append(s.ticks, t)
	}
	return s
}

// logarithmic returns a scale that holds low to high, which are positive.
func logarithmic(low, high float64) scale {
	if high/low < 3 {
		s := linear(low, high, 5, 0)
		s.log = true
		if s.low <= 0 {
			s.low = low
		}
		s.ticks = within(s.ticks, s.low, s.high)
		return s
	}
	low, high = low/1.05, high*1.05
	s := scale{low: low, high: high, log: true}
	first, last := int(math.Floor(math.Log10(low))), int(math.Ceil(math.Log10(high)))
	every, factors := max(1, (last-first)/6), []float64{1}
	if last-first <= 3 {
		factors = []float64{1, 2, 5}
	}
	for e := first; e <= last; e += every {
		for _, f := range factors {
			if t, err := strconv.ParseFloat(strconv.FormatFloat(f, 'f', 0, 64)+"e"+strconv.Itoa(e), 64); err == nil && t >= low && t <= high {
				s.ticks = append(s.ticks, t)
			}
		}
	}
	return s
}

// within returns the ticks from low to high.
func within(ticks []float64, low, high float64) []float64 {
	var in []float64
	slack := (high - low) * 1e-9
	for _, t := range ticks {
		if t >= low-slack && t <= high+slack {
			in = append(in, t)
		}
	}
	return in
}

// format returns a tick's label.
func (s scale) format(v float64, percent bool) string {
	unit, step := "", s.step
	if percent {
		v, step, unit = 100*v, 100*step, " %"
	}
	size := math.Abs(v)
	if size >= 1e7 || size > 0 && size < 1e-4 {
		return strconv.FormatFloat(v, 'g', 3, 64) + unit
	}
	decimals := -1
	if step > 0 {
		decimals = min(6, max(0, int(math.Ceil(-math.Log10(step)-1e-9))))
	}
	text := strconv.FormatFloat(v, 'f', decimals, 64)
	if percent && decimals < 0 {
		text = strconv.FormatFloat(v, 'g', 4, 64)
	}
	if step > 0 && strings.Trim(text, "-0.") == "" {
		text = "0"
	}
	whole, rest, _ := strings.Cut(text, ".")
	for i := len(whole) - 3; i > 0 && whole[i-1] != '-'; i -= 3 {
		whole = whole[:i] + "," + whole[i:]
	}
	if rest != "" {
		rest = "." + rest
	}
	return strings.Replace(whole, "-", "−", 1) + rest + unit
}
