package chart

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
)

// lightPalette and darkPalette are told apart also by those who do not see all
// colours (after Okabe and Ito 2008, "Color Universal Design"); on dark
// paper they are lighter.
func lightPalette() []string {
	return []string{"#0072b2", "#d55e00", "#009e73", "#a84f88", "#b88300", "#3f9fd8", "#5c5c5c"}
}

func darkPalette() []string {
	return []string{"#4aa8e8", "#ff8442", "#35c79b", "#e39ac4", "#e6b13d", "#8fd0f7", "#b8b8b8"}
}

// role returns the name of an ink and its colour on white and on dark paper.
func (i ink) role() (name, light, dark string) {
	switch i {
	case paper:
		return "paper", "#ffffff", "#15181d"
	case grid:
		return "grid", "#e6e8eb", "#2b3038"
	case axis:
		return "axis", "#8a9099", "#7d8590"
	case muted:
		return "muted", "#5a616b", "#a3abb6"
	case words:
		return "words", "#15181d", "#eceff3"
	}
	n := max(int(i), 0) % len(lightPalette())
	return "s" + strconv.Itoa(n), lightPalette()[n], darkPalette()[n]
}

// SVG returns the chart as a picture of lines and text. It has its own colours
// on dark pages.
func (c *Chart) SVG() ([]byte, error) {
	m, err := newFonts(1)
	if err != nil {
		return nil, err
	}
	h := c.height(m.width)
	s := &svg{}
	fmt.Fprintf(&s.b, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %s\" width=\"%d\" height=\"%s\" role=\"img\" aria-labelledby=\"title desc\" font-family=\"Helvetica Neue, Helvetica, Arial, sans-serif\">\n", width, num(h), width, num(h))
	fmt.Fprintf(&s.b, "<title id=\"title\">%s</title>\n<desc id=\"desc\">%s</desc>\n", escape(long(c.Title)), escape(c.Describe()))
	s.b.WriteString("<style>@media (prefers-color-scheme: dark) {\n")
	for i := words; i <= paper; i++ {
		s.style(i)
	}
	for i := range lightPalette() {
		s.style(ink(i))
	}
	s.b.WriteString("}</style>\n")
	c.draw(s, m.width)
	s.b.WriteString("</svg>\n")
	return s.b.Bytes(), nil
}

type svg struct{ b bytes.Buffer }

// style writes the colour of an ink on dark pages.
func (s *svg) style(i ink) {
	name, _, dark := i.role()
	fmt.Fprintf(&s.b, ".%s { fill: %s } .%s-line { stroke: %s }\n", name, dark, name, dark)
}

func (s *svg) fill(at point, w, h float64, in ink) {
	name, color, _ := in.role()
	fmt.Fprintf(&s.b, "<rect class=\"%s\" x=\"%s\" y=\"%s\" width=\"%s\" height=\"%s\" fill=\"%s\"/>\n", name, num(at.x), num(at.y), num(w), num(h), color)
}

func (s *svg) line(pts []point, width float64, in ink, faint, dashed bool) {
	name, color, _ := in.role()
	fmt.Fprintf(&s.b, "<path class=\"%s-line\" fill=\"none\" stroke=\"%s\" stroke-width=\"%s\" stroke-linejoin=\"round\" stroke-linecap=\"round\"", name, color, num(width))
	if faint {
		s.b.WriteString(" opacity=\"0.35\"")
	}
	if dashed {
		fmt.Fprintf(&s.b, " stroke-dasharray=\"%d %d\"", dashOn, dashOff)
	}
	s.b.WriteString(" d=\"M")
	for i, p := range pts {
		if i > 0 {
			s.b.WriteByte(' ')
		}
		s.b.WriteString(num(p.x) + "," + num(p.y))
	}
	s.b.WriteString("\"/>\n")
}

func (s *svg) dot(at point, radius float64, in ink) {
	name, color, _ := in.role()
	fmt.Fprintf(&s.b, "<circle class=\"%s\" cx=\"%s\" cy=\"%s\" r=\"%s\" fill=\"%s\"/>\n", name, num(at.x), num(at.y), num(radius), color)
}

func (s *svg) text(at point, text string, size float64, bold bool, to align, in ink) {
	name, color, _ := in.role()
	fmt.Fprintf(&s.b, "<text class=\"%s\" x=\"%s\" y=\"%s\" font-size=\"%s\" fill=\"%s\"", name, num(at.x), num(at.y), num(size), color)
	if bold {
		s.b.WriteString(" font-weight=\"600\"")
	}
	switch to {
	case middle:
		s.b.WriteString(" text-anchor=\"middle\"")
	case right:
		s.b.WriteString(" text-anchor=\"end\"")
	}
	fmt.Fprintf(&s.b, ">%s</text>\n", escape(text))
}

// num returns a number with at most two decimals.
func num(v float64) string {
	s := strings.TrimRight(strings.TrimRight(strconv.FormatFloat(v, 'f', 2, 64), "0"), ".")
	if s == "-0" {
		return "0"
	}
	return s
}

func escape(s string) string {
	return strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", "\"", "&quot;").Replace(s)
}
