package chart

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spirt-ml/spirt/events"
)

// Curves returns the learning curves of a run: loss and accuracy by round.
func Curves(title, subtitle string, v *events.View) Chart {
	x, y := points(&v.Loss)
	training := Series{Name: "training", X: x, Y: y}
	loss := Panel{Title: "Loss"}
	if w := window(len(y)); w > 1 {
		faint := training
		faint.Name, faint.Faint = "", true
		training.Name, training.Y = fmt.Sprintf("training, mean of %d rounds", w), smooth(y, w)
		loss.Series = append(loss.Series, faint)
	}
	loss.Series = append(loss.Series, training)
	if x, y := points(&v.ValidationLoss); len(x) > 0 {
		loss.Series = append(loss.Series, Series{Name: "validation", X: x, Y: y, Color: 1, Marked: true})
	}
	accuracy := Panel{Title: "Accuracy", Percent: true}
	if x, y := points(&v.Accuracy); len(x) > 0 {
		accuracy.Series = append(accuracy.Series, Series{Name: "validation", X: x, Y: y, Color: 1, Marked: true})
	}
	if d := v.Done; d != nil {
		at := []float64{float64(d.Rounds)}
		if d.Loss != nil {
			loss.Series = append(loss.Series, Series{Name: "test, at the end", X: at, Y: []float64{*d.Loss}, Color: 2, Alone: true})
		}
		if d.Accuracy != nil {
			accuracy.Series = append(accuracy.Series, Series{Name: "test, at the end", X: at, Y: []float64{*d.Accuracy}, Color: 2, Alone: true})
		}
	}
	loss.Log = wide(loss.Series)
	return Chart{Title: title, Subtitle: subtitle, X: "round", Panels: []Panel{loss, accuracy}}
}

// A Run is one of those that Compare lays over each other.
type Run struct {
	Name string
	View *events.View
}

// Compare returns the learning curves of several runs over each other.
func Compare(title, subtitle string, runs []Run) Chart {
	loss, accuracy := Panel{Title: "Training loss"}, Panel{Title: "Validation accuracy", Percent: true}
	for i, r := range runs {
		x, y := points(&r.View.Loss)
		loss.Series = append(loss.Series, Series{Name: r.Name, X: x, Y: smooth(y, window(len(y))), Color: i})
		x, y = points(&r.View.Accuracy) // if there are none, the run has its place all the same
		accuracy.Series = append(accuracy.Series, Series{Name: r.Name, X: x, Y: y, Color: i, Marked: true})
	}
	loss.Log = wide(loss.Series)
	return Chart{Title: title, Subtitle: subtitle, X: "round", Panels: []Panel{loss, accuracy}}
}

func points(s *events.Series) (x, y []float64) {
	rounds, y := s.Points()
	x = make([]float64, len(rounds))
	for i, r := range rounds {
		x[i] = float64(r)
	}
	return x, y
}

// window returns over how many points of n a noisy curve is averaged.
func window(n int) int { return max(1, n/25) }

// smooth returns the mean of each value and those before it, w in all.
func smooth(y []float64, w int) []float64 {
	out := make([]float64, len(y))
	sum := 0.0
	for i, v := range y {
		sum += v
		if i >= w {
			sum -= y[i-w]
		}
		out[i] = sum / float64(min(i+1, w))
	}
	return out
}

// wide reports whether values are so far apart that a logarithmic axis shows
// them better.
func wide(series []Series) bool {
	low, high := maxReal, 0.0
	for _, s := range series {
		for _, y := range s.Y {
			if y > 0 && y <= maxReal && !s.Faint {
				low, high = min(low, y), max(high, y)
			}
		}
	}
	return high/low >= 8
}

// WriteFile writes a chart as SVG or PNG, as the end of the name says. A file of
// that name is replaced, by a whole one only.
func WriteFile(path string, c Chart) error {
	var b []byte
	var err error
	switch ext := strings.ToLower(filepath.Ext(path)); ext {
	case ".svg":
		b, err = c.SVG()
	case ".png":
		b, err = c.PNG()
	default:
		return fmt.Errorf("%s is no name of a picture: let it end in .svg or .png", path)
	}
	if err != nil {
		return fmt.Errorf("drawing %s: %w", path, err)
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // there is none once it has its name
	if _, err = f.Write(b); err == nil {
		err = f.Chmod(0o644)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}
