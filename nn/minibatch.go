package nn

import (
	"errors"
	"fmt"
	"math"
)

// Chunk is how many samples an evaluation takes at a time. It is the same
// always, so that a loss does not depend on what was computed before.
const Chunk = 64

// ErrNotFinite: a loss is a NaN or an infinity.
var ErrNotFinite = errors.New("the loss is not finite")

// Score is what became of some samples.
type Score struct {
	Loss    float64 // mean over the samples
	Correct int
	Samples int
}

// Minibatch computes on samples that are bytes: a pixel is byte*scale + offset,
// a label one byte. It holds the memory for it, and is used by one goroutine at
// a time. The same samples give the same bits wherever they are computed on one
// machine: a function and the database both use it.
type Minibatch struct {
	model         *Model
	workspace     *Workspace
	room          int // samples
	n             int // that are loaded
	x             []float32
	labels        []int32
	pixels        [256]float32 // what each byte means
	scale, offset float32      // of pixels
}

// NewMinibatch returns one without room for samples: call Grow, and then
// Normalise.
func (m *Model) NewMinibatch() *Minibatch { return &Minibatch{model: m} }

// MinibatchSize returns how many bytes a Minibatch with room for n samples
// takes.
func (m *Model) MinibatchSize(n int) int64 {
	return m.WorkspaceSize(n) + 4*int64(n)*int64(m.inputLen+1)
}

// TableSize bounds the memory that New takes for a Spec, beside a few KB. The
// Spec must be valid.
func (s Spec) TableSize() (int64, error) {
	layers, err := s.resolve()
	total := int64(0)
	for _, l := range layers {
		if l.Kind == Conv2D {
			total += 24 * int64(l.out.h) * int64(l.out.w)
		}
	}
	return total, err
}

// Room returns how many samples there is room for.
func (b *Minibatch) Room() int { return b.room }

// Grow makes room for n samples. What was loaded is lost where there was less.
func (b *Minibatch) Grow(n int) {
	if n <= b.room {
		return
	}
	b.workspace, b.x, b.labels = nil, nil, nil // may be collected before their successors are made
	b.workspace = b.model.NewWorkspace(n)
	b.x = make([]float32, n*b.model.inputLen)
	b.labels = make([]int32, n)
	b.room, b.n = n, 0
}

// Normalise says what the bytes of pixels mean.
func (b *Minibatch) Normalise(scale, offset float32) {
	if b.scale == scale && b.offset == offset {
		return
	}
	for v := range b.pixels {
		b.pixels[v] = float32(float32(v)*scale) + offset
	}
	b.scale, b.offset = scale, offset
}

// Load takes samples: images one after the other, and a label for each. rows
// only names them in errors. There must be room for them.
func (b *Minibatch) Load(images, labels []byte, rows []int) error {
	n, in := len(rows), b.model.inputLen
	if n > b.room {
		panic("nn: more samples than there is room for")
	}
	b.n = 0
	if len(labels) != n {
		return fmt.Errorf("labels have %d bytes a row, want 1", len(labels)/max(n, 1))
	}
	for i, label := range labels {
		if int(label) >= b.model.spec.Classes {
			return fmt.Errorf("labels: row %d is %d, but model %s has %d classes", rows[i], label, quote(b.model.spec.Name), b.model.spec.Classes)
		}
		b.labels[i] = int32(label)
	}
	if len(images) != n*in {
		return fmt.Errorf("images have %d bytes a row, but model %s takes %d", len(images)/max(n, 1), quote(b.model.spec.Name), in)
	}
	x := b.x[:len(images)]
	for i, v := range images {
		x[i] = b.pixels[v]
	}
	b.n = n
	return nil
}

// Gradient computes the mean loss of the samples that are loaded, and its
// gradient. A loss that is not finite is ErrNotFinite; the gradient the caller
// must look at.
func (b *Minibatch) Gradient(grad, params []float32) (Score, error) {
	s := Score{Samples: b.n}
	s.Loss, s.Correct = b.model.Gradient(grad, params, b.x[:b.n*b.model.inputLen], b.labels[:b.n], b.workspace)
	return s, s.check()
}

// Evaluate computes the mean loss of samples that load loads, at most Chunk at
// a time. There must be room for a Chunk, and at least one row.
func (b *Minibatch) Evaluate(params []float32, rows []int, load func(rows []int) error) (Score, error) {
	s, sum := Score{Samples: len(rows)}, 0.0
	for len(rows) > 0 {
		part := rows[:min(len(rows), Chunk)]
		if err := load(part); err != nil {
			return s, err
		}
		loss, correct := b.model.Evaluate(params, b.x[:b.n*b.model.inputLen], b.labels[:b.n], b.workspace)
		sum += loss
		s.Correct += correct
		rows = rows[len(part):]
	}
	s.Loss = sum / float64(s.Samples)
	return s, s.check()
}

func (s Score) check() error {
	if math.IsNaN(s.Loss) || math.IsInf(s.Loss, 0) {
		return fmt.Errorf("%w: %g", ErrNotFinite, s.Loss)
	}
	return nil
}
