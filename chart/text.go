package chart

import (
	"fmt"
	"strconv"
	"strings"
)

// Text draws each panel with characters, columns wide at most and rows high:
// 1, 2, 3... for its series, without those that are faint.
func (c *Chart) Text(columns, rows int) string {
	const left = 10
	w, h := max(columns-left-2, 10), max(rows, 3)
	var b strings.Builder
	for _, p := range c.panels() {
		xs, ys, ok := p.scales(point{}, 1)
		title := label(p.Title)
		if p.Log {
			title += " (log scale)"
		}
		fmt.Fprintf(&b, "%*s %s\n", left, "", title)
		if !ok {
			fmt.Fprintf(&b, "%*s no data\n", left, "")
			continue
		}
		xs.from, xs.to = 0, float64(w-1)
		ys.from, ys.to = float64(h-1), 0
		cells := make([][]rune, h)
		for i := range cells {
			cells[i] = []rune(strings.Repeat(" ", w))
		}
		n := 0
		for _, s := range p.series() {
			if s.Faint {
				continue
			}
			n++
			mark := '*'
			if n < 36 {
				mark = rune("123456789abcdefghijklmnopqrstuvwxyz"[n-1])
			}
			for _, run := range s.runs(xs, ys) {
				for i, at := range run {
					cells[cell(at.y, h)][cell(at.x, w)] = mark
					if i == 0 || s.Alone {
						continue
					}
					before := run[i-1]
					for x := cell(before.x, w) + 1; x < cell(at.x, w); x++ { // between the points
						f := (float64(x) - before.x) / (at.x - before.x)
						if y := cell(before.y+f*(at.y-before.y), h); cells[y][x] == ' ' {
							cells[y][x] = mark
						}
					}
				}
			}
		}
		labels := map[int]string{}
		for _, i := range []int{0, (h - 1) / 2, h - 1} {
			labels[i] = scale{}.format(round3(ys.value(float64(i))), p.Percent)
		}
		for i, row := range cells {
			fmt.Fprintf(&b, "%*s │%s\n", left-1, labels[i], strings.TrimRight(string(row), " "))
		}
		fmt.Fprintf(&b, "%*s └%s\n", left-1, "", strings.Repeat("─", w))
		first, last := xs.format(xs.low, false), xs.format(xs.high, false)
		fmt.Fprintf(&b, "%*s  %s%*s\n", left-1, "", first, w-len([]rune(first)), last+" "+label(c.X))
	}
	return b.String()
}

// round3 rounds to three digits.
func round3(v float64) float64 {
	r, err := strconv.ParseFloat(strconv.FormatFloat(v, 'g', 3, 64), 64)
	if err != nil {
		return v
	}
	return r
}

// cell returns the row or column of a pixel.
func cell(v float64, n int) int { return min(max(int(v+0.5), 0), n-1) }
