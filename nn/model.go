package nn

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"

	"github.com/spirt-ml/spirt/internal/kernel"
	"github.com/spirt-ml/spirt/tensor"
)

// Model is a network that is ready to compute. It holds no parameters.
type Model struct {
	spec      Spec
	views     []tensor.View
	numParams int
	fanIn     []int // inputs of one output, for each view
	inputLen  int   // numbers of one sample

	blocks []block  // the layers before the flatten layer
	dense  []dense  // the linear layers
	final  imageDim // what is flattened
}

// imageDim is the size of an image; its padding lies outside.
type imageDim struct{ c, h, w, pad int }

// len returns the floats of the padded image.
func (d imageDim) len() int { return d.c * (d.h + 2*d.pad) * (d.w + 2*d.pad) }

// block is a convolution, a pooling and a ReLU, each of them optional, that
// run on one image after the other while it is in the cache. ReLU is applied
// after the pooling wherever it stood: the maximum of non-negative parts is
// the non-negative part of the maximum, and the gradients are the same too.
type block struct {
	in, out      imageDim // in.pad is the convolution's padding
	conv         *kernel.Conv
	weight, bias tensor.View // of the convolution

	mid                     imageDim // input of the pooling
	lanes                   int      // floats of one pixel of mid
	kernel, stride, padding int      // of the pooling; kernel 1 where there is none
	pooled, relu            bool
}

// dense is a linear layer and the ReLU behind it, if any.
type dense struct {
	in, out      int
	weight, bias tensor.View
	relu         bool
}

// New makes a Model of a Spec, which it validates and copies. It takes memory
// for tables, some 24 bytes for each pixel that a convolution puts out: 100 MB
// for the largest Spec that is valid, 24 KB for LeNet-5. Ask WorkspaceSize
// before a workspace for a Spec from outside is made.
func New(spec Spec) (*Model, error) {
	layers, err := spec.resolve()
	if err != nil {
		return nil, err
	}
	spec.Input = slices.Clone(spec.Input)
	spec.Layers = slices.Clone(spec.Layers)
	m := &Model{spec: spec, inputLen: layers[0].in.size()}
	for _, l := range layers {
		m.add(l)
	}
	// Every block writes its output into the padded input of the next.
	m.final = imageDim{c: spec.Input[0], h: spec.Input[1], w: spec.Input[2]}
	for i := range m.blocks {
		if i+1 < len(m.blocks) {
			m.blocks[i].out.pad = m.blocks[i+1].in.pad
		}
		m.final = m.blocks[i].out
	}
	return m, nil
}

// view names the next parameters.
func (m *Model) view(name string, fanIn int, shape ...int) tensor.View {
	v := tensor.View{Name: name, Shape: shape, Offset: m.numParams}
	m.numParams += v.Len()
	m.views = append(m.views, v)
	m.fanIn = append(m.fanIn, fanIn)
	return v
}

func (m *Model) add(l resolved) {
	in := imageDim{c: l.in.c, h: l.in.h, w: l.in.w}
	plain := block{in: in, mid: in, out: in, lanes: l.in.c, kernel: 1, stride: 1}
	switch l.Kind {
	case Conv2D:
		b := plain
		fanIn := l.in.c * l.Kernel * l.Kernel
		b.in.pad = l.Padding
		b.conv = kernel.NewConv(l.in.c, l.in.h+2*l.Padding, l.in.w+2*l.Padding, l.Kernel, l.Stride, l.Out)
		b.weight = m.view(l.Name+".weight", fanIn, l.Out, l.in.c, l.Kernel, l.Kernel)
		b.bias = m.view(l.Name+".bias", fanIn, l.Out)
		b.mid = imageDim{c: l.out.c, h: l.out.h, w: l.out.w}
		b.lanes, b.out = b.conv.OutLanes, b.mid
		m.blocks = append(m.blocks, b)
	case MaxPool:
		if last := len(m.blocks) - 1; last < 0 || m.blocks[last].conv == nil || m.blocks[last].pooled {
			m.blocks = append(m.blocks, plain)
		}
		b := &m.blocks[len(m.blocks)-1]
		b.pooled, b.kernel, b.stride, b.padding = true, l.Kernel, l.Stride, l.Padding
		b.out = imageDim{c: l.out.c, h: l.out.h, w: l.out.w}
	case ReLU:
		switch {
		case len(m.dense) > 0:
			m.dense[len(m.dense)-1].relu = true
		case len(m.blocks) > 0:
			m.blocks[len(m.blocks)-1].relu = true
		default: // also between flatten and the first linear layer
			if l.in.flat {
				s := m.spec.Input
				in = imageDim{c: s[0], h: s[1], w: s[2]}
				plain.in, plain.mid, plain.out, plain.lanes = in, in, in, in.c
			}
			plain.relu = true
			m.blocks = append(m.blocks, plain)
		}
	case Linear:
		m.dense = append(m.dense, dense{
			in: l.in.c, out: l.Out,
			weight: m.view(l.Name+".weight", l.in.c, l.Out, l.in.c),
			bias:   m.view(l.Name+".bias", l.in.c, l.Out),
		})
	}
}

// Spec returns a copy of the Spec that the model was made of.
func (m *Model) Spec() Spec {
	s := m.spec
	s.Input, s.Layers = slices.Clone(s.Input), slices.Clone(s.Layers)
	return s
}

// NumParams returns the length of the parameter and gradient vectors.
func (m *Model) NumParams() int { return m.numParams }

// NumBuffers returns the length of the buffer vector: zero, since no kind of
// layer has running statistics.
func (m *Model) NumBuffers() int { return 0 }

// InputLen returns the numbers of one sample: channels x height x width.
func (m *Model) InputLen() int { return m.inputLen }

// Views returns the name, shape and place of every parameter, in PyTorch's
// state_dict order.
func (m *Model) Views() []tensor.View {
	views := slices.Clone(m.views)
	for i := range views {
		views[i].Shape = slices.Clone(views[i].Shape)
	}
	return views
}

// Init sets params as PyTorch initialises Linear and Conv2d: uniform between
// plus and minus 1/sqrt(inputs of one output), weights and biases. The same
// seed gives the same bits on every CPU.
func (m *Model) Init(params []float32, seed uint64) {
	if len(params) != m.numParams {
		panic("nn: params has the wrong length")
	}
	random := rand.New(rand.NewPCG(seed, 0x737069727420696e)) // the second half keeps the stream apart from others'
	for i, v := range m.views {
		bound := 1 / math.Sqrt(float64(m.fanIn[i]))
		p := v.Of(params)
		for j := range p {
			// A multiple of 2^-23 in [-1, 1), exact; one rounded product, and no
			// sum that a compiler could fuse.
			u := float64(int64(random.Uint64()>>40)-1<<23) / (1 << 23)
			p[j] = float32(u * bound)
		}
	}
}

// check panics when the arguments of Gradient or Evaluate do not fit: they
// come from the same program, which validated them at its boundary.
func (m *Model) check(params, x []float32, labels []int32, ws *Workspace) {
	switch {
	case ws == nil || ws.model != m:
		panic("nn: workspace belongs to another model")
	case len(params) != m.numParams:
		panic("nn: params has the wrong length")
	case len(x) != len(labels)*m.inputLen:
		panic("nn: x has the wrong length")
	}
	for _, l := range labels {
		if l < 0 || int(l) >= m.spec.Classes {
			panic(fmt.Sprintf("nn: label %d is outside 0 to %d", l, m.spec.Classes-1))
		}
	}
}
