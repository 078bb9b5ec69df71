package chart

import (
	"bytes"
	"encoding/xml"
	"errors"
	"flag"
	"image/png"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/events"
)

var update = flag.Bool("update", false, "write the golden files anew")

// run returns a run of so many rounds whose loss falls.
func run(rounds int) *events.View {
	var v events.View
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for i := 1; i <= rounds; i++ {
		x := float64(i)
		for peer := 1; peer <= 2; peer++ {
			loss := 2.3/(1+x/25) + 0.05*math.Abs(math.Sin(float64(7*i+peer)))
			v.Add(&events.Event{Time: at, Event: "round", Peer: peer, Round: uint64(i), Loss: &loss, Seconds: 0.04})
		}
		if i%25 == 0 {
			accuracy, loss := 1-0.9/(1+x/20), 2.3/(1+x/25)
			v.Add(&events.Event{Time: at, Event: "validation", Peer: 1, Round: uint64(i), Accuracy: &accuracy, Loss: &loss})
		}
		at = at.Add(40 * time.Millisecond)
	}
	accuracy, loss := 0.9725, 0.09
	v.Add(&events.Event{Time: at, Event: "done", Rounds: uint64(rounds), Accuracy: &accuracy, Loss: &loss})
	return &v
}

func render(t *testing.T, c Chart) (svg, pixels []byte) {
	t.Helper()
	svg, err := c.SVG()
	if err != nil {
		t.Fatal(err)
	}
	for d := xml.NewDecoder(bytes.NewReader(svg)); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("the SVG is no XML: %v", err)
		}
	}
	// Every number is one that SVG knows.
	for _, bad := range []string{"NaN", "Inf"} {
		if i := bytes.Index(svg, []byte(bad)); i >= 0 {
			t.Errorf("the SVG has %s: %s", bad, svg[max(0, i-60):i+10])
		}
	}
	pixels, err = c.PNG()
	if err != nil {
		t.Fatal(err)
	}
	return svg, pixels
}

func TestGolden(t *testing.T) {
	c := Curves("lenet5 on mnist-10k", "4 peers · 400 rounds · accuracy 97.25 % on the test samples", run(400))
	got, _ := render(t, c)
	path := filepath.Join("testdata", "curves.svg")
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("the SVG differs from %s: look at it and run go test ./chart -update", path)
	}
}

// What is drawn stands where the values are, in the colour of the series.
func TestPixels(t *testing.T) {
	c := Chart{Title: "t", X: "x", Panels: []Panel{{Title: "p", Series: []Series{
		{Name: "flat", X: []float64{0, 10}, Y: []float64{5, 5}},
		{Name: "dots", X: []float64{0, 10}, Y: []float64{0, 10}, Color: 1, Alone: true},
	}}}}
	_, b := render(t, c)
	img, err := png.Decode(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	f, err := newFonts(1)
	if err != nil {
		t.Fatal(err)
	}
	if s := img.Bounds().Size(); s.X != width*Scale || s.Y != int(math.Ceil(c.height(f.width)*Scale)) {
		t.Errorf("the picture is %v", s)
	}
	top := c.top(f.width)
	at := func(x, y float64) ink { // the series whose colour is there, else paper
		r, g, b, _ := img.At(int(x*Scale), int(y*Scale)).RGBA()
		for i := range lightPalette() {
			if c := ink(i).rgba(); uint8(r>>8) == c.R && uint8(g>>8) == c.G && uint8(b>>8) == c.B {
				return ink(i)
			}
		}
		return paper
	}
	from, to := float64(margin+tickWidth), float64(width-margin)
	for _, c := range []struct {
		x, y float64
		want ink
	}{
		{(from + to) / 2, top + plotHeight/2, 0}, {from + 50, top + plotHeight/2, 0}, {(from + to) / 2, top + plotHeight/2 + 9, paper},
		{from, top + plotHeight, 1}, {to, top, 1}, {to - 20, top + 20, paper},
	} {
		if got := at(c.x, c.y); got != c.want {
			t.Errorf("at %v,%v is the ink %d, want %d", c.x, c.y, got, c.want)
		}
	}
}

// Whatever the values are, there is a picture, and it is bounded.
func TestOddValues(t *testing.T) {
	nan, inf := math.NaN(), math.Inf(1)
	long := make([]float64, 10_000)
	x := make([]float64, len(long))
	for i := range long {
		x[i], long[i] = float64(i+1), 1+math.Sin(float64(i))/2
	}
	long[5000] = 9 // a peak that must be seen
	for name, s := range map[string]Series{
		"empty":     {},
		"nan":       {X: []float64{1, 2}, Y: []float64{nan, nan}},
		"one":       {X: []float64{1}, Y: []float64{0.5}},
		"zero":      {X: []float64{0}, Y: []float64{0}},
		"gap":       {X: []float64{1, 2, 3, 4}, Y: []float64{1, nan, inf, 2}},
		"negative":  {X: []float64{1, 2, 3}, Y: []float64{-1, 0, 1}},
		"huge":      {X: []float64{1, 2}, Y: []float64{-1e99, 1e99}},
		"tiny":      {X: []float64{1, 2}, Y: []float64{5e-324, 1e-320}},
		"same":      {X: []float64{1, 2}, Y: []float64{3, math.Nextafter(3, 4)}},
		"far":       {X: []float64{1e99, 1e99 + 1}, Y: []float64{1, 2}},
		"overflow":  {X: []float64{1, 2}, Y: []float64{-math.MaxFloat64, math.MaxFloat64}},
		"unequal":   {X: []float64{1, 2, 3}, Y: []float64{1}},
		"long":      {X: x, Y: long},
		"two":       {X: []float64{1, 1}, Y: []float64{1, 2}},
		"fractions": {X: []float64{1, 2, 3}, Y: []float64{0.999, 1, 0.9995}},
	} {
		for _, log := range []bool{false, true} {
			for _, percent := range []bool{false, true} {
				s.Name = name
				c := Chart{Title: name, X: "round", Panels: []Panel{{Title: name, Log: log, Percent: percent, Series: []Series{s}}}}
				svg, b := render(t, c)
				if len(svg) > 120_000 || len(b) > 1<<20 {
					t.Errorf("%s: %d bytes of SVG, %d of PNG", name, len(svg), len(b))
				}
				if text := c.Text(70, 8); strings.Contains(text, "NaN") {
					t.Errorf("%s: %s", name, text)
				}
				if name == "long" && !log {
					_, ys, _ := c.Panels[0].scales(point{0, 0}, 400)
					if peak := num(ys.at(9)); !strings.Contains(string(c.Text(70, 8)), "1") || len(reduce(s.runs(ys, ys)[0])) > len(long) {
						t.Errorf("%s: no peak at %s", name, peak)
					}
				}
			}
		}
	}
	run := make([]point, len(long))
	for i := range run {
		run[i] = point{x[i] / 25, long[i]}
	}
	kept := reduce(run)
	if len(kept) > 4*(2*400+1) || !slices.Contains(kept, run[5000]) || kept[0] != run[0] || kept[len(kept)-1] != run[len(run)-1] {
		t.Errorf("%d of %d points are left, or the peak is not", len(kept), len(run))
	}
}

func TestTicks(t *testing.T) {
	for _, c := range []struct {
		s    scale
		pct  bool
		want string
	}{
		{linear(0, 400, 6, 1), false, "0 100 200 300 400"},
		{linear(0, 12_000, 6, 1), false, "0 2,000 4,000 6,000 8,000 10,000 12,000"},
		{linear(0, 3, 6, 1), false, "0 1 2 3"},
		{linear(0.89, 0.973, 5, 0), true, "88 % 90 % 92 % 94 % 96 % 98 %"},
		{linear(-1, 1, 5, 0), false, "−1.0 −0.5 0 0.5 1.0"},
		{logarithmic(0.04, 2.3), false, "0.05 0.1 0.2 0.5 1 2"},
		{logarithmic(1e-6, 100), false, "1e-06 1e-05 0.0001 0.001 0.01 0.1 1 10 100"},
		{logarithmic(1, 1.2), false, "1.00 1.05 1.10 1.15 1.20"},
	} {
		var got []string
		for _, tick := range c.s.ticks {
			got = append(got, c.s.format(tick, c.pct))
		}
		if s := strings.Join(got, " "); s != c.want {
			t.Errorf("%q, want %q", s, c.want)
		}
	}
}

func TestText(t *testing.T) {
	c := Chart{X: "round", Panels: []Panel{{Title: "p", Series: []Series{{X: []float64{0, 10}, Y: []float64{0, 10}}}}}}
	want := `           p
       10 │        11
          │      11
        5 │    11
          │  11
        0 │11
          └──────────
           0 10 round
`
	if got := c.Text(22, 5); got != want {
		t.Errorf("\n%s\nwant\n%s", got, want)
	}
}

// Names come from files and arguments.
func TestNames(t *testing.T) {
	c := Chart{Title: "a<b>&\x1b[31m" + strings.Repeat("long ", 200) + "\xff", X: "\x00", Panels: []Panel{{Series: []Series{{Name: "\x1b<script>" + strings.Repeat("x", 500), X: []float64{1}, Y: []float64{1}}}}}}
	svg, _ := render(t, c)
	if bytes.Contains(svg, []byte("<script>")) || bytes.ContainsRune(svg, 0x1b) || len(svg) > 10_000 {
		t.Errorf("%d bytes: %.2000s", len(svg), svg)
	}
	if text := c.Text(80, 5); strings.ContainsRune(text, 0x1b) {
		t.Errorf("%q", text)
	}
}

func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	c := Curves("t", "", run(3))
	for _, name := range []string{"a.svg", "a.png", "a.svg"} {
		if err := WriteFile(filepath.Join(dir, name), c); err != nil {
			t.Error(err)
		}
	}
	if err := WriteFile(filepath.Join(dir, "a.pdf"), c); err == nil || !strings.Contains(err.Error(), ".svg or .png") {
		t.Error(err)
	}
	if err := WriteFile(filepath.Join(dir, "none", "a.svg"), c); err == nil {
		t.Error("a folder that is not there was written to")
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 2 {
		t.Error(left, err)
	}
}
