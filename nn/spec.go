package nn

import (
	"fmt"
	"sort"
	"strings"

	"github.com/spirt-ml/spirt/internal/spell"
)

// Bounds of a Spec. They keep every product of sizes far from overflow and a
// hostile Spec from taking the machine's memory.
const (
	MaxLayers      = 256     // layers in a Spec
	MaxParams      = 1 << 28 // parameters of a model: 1 GiB of float32
	MaxActivations = 1 << 22 // numbers that one sample takes, input and output of every layer together
	MaxSize        = 1 << 20 // any one size: classes, features, channels, height, width
	MaxKernel      = 15      // side of a convolution or pooling window, and stride
	maxName        = 64      // bytes of a model's or layer's name
)

// Kinds of layers.
const (
	Linear  = "linear"  // Out features, with bias; needs a flat input
	Conv2D  = "conv2d"  // Out channels, Kernel x Kernel, Stride, zero Padding, with bias
	MaxPool = "maxpool" // Kernel x Kernel, Stride, Padding with minus infinity
	ReLU    = "relu"
	Flatten = "flatten" // channels x height x width becomes one vector, in that order
)

// Spec describes a network: the input, the layers from first to last, and the
// number of classes that the last one must end in. The loss, softmax
// cross-entropy, is implied. It is written as JSON in job files, in a model
// file's metadata and in invocations.
type Spec struct {
	Name    string      `json:"name"`
	Input   []int       `json:"input"` // channels, height, width
	Classes int         `json:"classes"`
	Layers  []LayerSpec `json:"layers"`
}

// LayerSpec describes one layer. Fields that a kind does not use must be zero.
type LayerSpec struct {
	Kind    string `json:"kind"`
	Name    string `json:"name,omitempty"`    // prefix of the parameters; empty: conv1, conv2, ..., fc1, fc2, ...
	Out     int    `json:"out,omitempty"`     // output features or channels
	Kernel  int    `json:"kernel,omitempty"`  // side of the window
	Stride  int    `json:"stride,omitempty"`  // zero: 1 for conv2d, Kernel for maxpool
	Padding int    `json:"padding,omitempty"` // on each side; less than Kernel, for maxpool at most half of it
}

// shape is what flows between two layers: an image, or if flat a vector of c
// features.
type shape struct {
	c, h, w int
	flat    bool
}

func (s shape) size() int { return s.c * s.h * s.w }

// Validate checks that the layers fit together and are within bounds. The
// error names the layer, counted from 1.
func (s Spec) Validate() error {
	_, err := s.resolve()
	return err
}

// resolved is a LayerSpec with its defaults filled in and its shapes.
type resolved struct {
	LayerSpec
	in, out shape
}

// params returns the number of weights and of biases.
func (r resolved) params() (weights, biases int) {
	switch r.Kind {
	case Linear:
		return r.Out * r.in.c, r.Out
	case Conv2D:
		return r.Out * r.in.c * r.Kernel * r.Kernel, r.Out
	}
	return 0, 0
}

func (s Spec) resolve() ([]resolved, error) {
	fail := func(format string, args ...any) ([]resolved, error) {
		return nil, fmt.Errorf("model %s: %w", quote(s.Name), fmt.Errorf(format, args...))
	}
	if len(s.Name) > maxName {
		return fail("the name has %d bytes, at most %d are allowed", len(s.Name), maxName)
	}
	if len(s.Input) != 3 {
		return fail("input has %d sizes, want 3: channels, height, width", len(s.Input))
	}
	for i, n := range s.Input {
		if n < 1 || n > MaxSize {
			return fail("input size %d is %d, want 1 to %d", i+1, n, MaxSize)
		}
	}
	if s.Classes < 2 || s.Classes > MaxSize {
		return fail("classes is %d, want 2 to %d", s.Classes, MaxSize)
	}
	if len(s.Layers) == 0 {
		return fail("no layers, want at least flatten and linear")
	}
	if len(s.Layers) > MaxLayers {
		return fail("%d layers, at most %d are allowed", len(s.Layers), MaxLayers)
	}
	at := shape{c: s.Input[0], h: s.Input[1], w: s.Input[2]}
	sample, ok := volume(at.c, at.h, at.w)
	if !ok {
		return fail("an input of %dx%dx%d is too large, at most %d numbers are allowed", at.c, at.h, at.w, MaxActivations)
	}
	layers := make([]resolved, 0, len(s.Layers))
	names := map[string]bool{}
	convs, linears, params := 0, 0, 0
	for i, l := range s.Layers {
		r := resolved{LayerSpec: l, in: at}
		err := r.resolve()
		if err == nil {
			switch {
			case l.Kind == Conv2D:
				convs++
				err = r.name(fmt.Sprintf("conv%d", convs), names)
			case l.Kind == Linear:
				linears++
				err = r.name(fmt.Sprintf("fc%d", linears), names)
			case l.Name != "":
				err = fmt.Errorf("has a name, but no parameters to name: remove it")
			}
		}
		if err != nil {
			return fail("layer %d (%s): %w", i+1, quote(l.Kind), err)
		}
		w, b := r.params()
		if params += w + b; params > MaxParams {
			return fail("layer %d (%s): the model has more than %d parameters", i+1, quote(l.Kind), MaxParams)
		}
		at = r.out
		more, _ := volume(at.c, at.h, at.w)
		if sample += more; sample > MaxActivations {
			return fail("layer %d (%s): the layers of one sample take more than %d numbers", i+1, quote(l.Kind), MaxActivations)
		}
		layers = append(layers, r)
	}
	switch last := layers[len(layers)-1]; {
	case linears == 0:
		return fail("no linear layer: the last layer must be linear with %d outputs", s.Classes)
	case last.Kind != Linear:
		return fail("the last layer is %s, it must be linear with %d outputs", last.Kind, s.Classes)
	case last.Out != s.Classes:
		return fail("the last layer has %d outputs, but there are %d classes", last.Out, s.Classes)
	}
	return layers, nil
}

// volume returns the product, and whether it is at most MaxActivations. Each
// factor is at most a few MaxSize.
func volume(c, h, w int) (int, bool) {
	if int64(c)*int64(h) > MaxActivations || int64(c)*int64(h)*int64(w) > MaxActivations {
		return 0, false
	}
	return c * h * w, true
}

// name checks the given name or sets the default one.
func (r *resolved) name(standard string, taken map[string]bool) error {
	if r.Name == "" {
		r.Name = standard
	}
	if len(r.Name) > maxName {
		return fmt.Errorf("the name has %d bytes, at most %d are allowed", len(r.Name), maxName)
	}
	for _, c := range []byte(r.Name) {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == '.') {
			return fmt.Errorf("the name %q may only have letters, digits, dots and underscores", r.Name)
		}
	}
	if taken[r.Name] {
		return fmt.Errorf("the name %q is taken by an earlier layer", r.Name)
	}
	taken[r.Name] = true
	return nil
}

// resolve fills in the defaults and the output shape from the input shape.
func (r *resolved) resolve() error {
	window := r.Kind == Conv2D || r.Kind == MaxPool
	switch r.Kind {
	case Linear, Conv2D, MaxPool, ReLU, Flatten:
	default:
		return fmt.Errorf("unknown kind, have %s, %s, %s, %s, %s", Linear, Conv2D, MaxPool, ReLU, Flatten)
	}
	if !window && (r.Kernel != 0 || r.Stride != 0 || r.Padding != 0) {
		return fmt.Errorf("kernel, stride and padding are for %s and %s only", Conv2D, MaxPool)
	}
	if r.Kind == Linear || r.Kind == Conv2D {
		if r.Out < 1 || r.Out > MaxSize {
			return fmt.Errorf("out is %d, want 1 to %d", r.Out, MaxSize)
		}
	} else if r.Out != 0 {
		return fmt.Errorf("out is for %s and %s only", Linear, Conv2D)
	}
	r.out = r.in
	switch {
	case r.Kind == Linear:
		if !r.in.flat {
			return fmt.Errorf("needs a flat input: put a flatten layer before it")
		}
		r.out = shape{c: r.Out, h: 1, w: 1, flat: true}
		return r.weigh(r.in.c)
	case r.Kind == Flatten:
		r.out = shape{c: r.in.size(), h: 1, w: 1, flat: true}
	case window:
		if r.in.flat {
			return fmt.Errorf("needs an image: put it before the flatten layer")
		}
		return r.slide()
	}
	return nil
}

// slide resolves a layer with a sliding window.
func (r *resolved) slide() error {
	if r.Kernel < 1 || r.Kernel > MaxKernel {
		return fmt.Errorf("kernel is %d, want 1 to %d", r.Kernel, MaxKernel)
	}
	if r.Stride < 0 || r.Stride > MaxKernel {
		return fmt.Errorf("stride is %d, want 1 to %d", r.Stride, MaxKernel)
	}
	most := r.Kernel - 1
	if r.Kind == MaxPool {
		most = r.Kernel / 2
	}
	if r.Padding < 0 || r.Padding > most {
		return fmt.Errorf("padding is %d, want 0 to %d for a kernel of %d", r.Padding, most, r.Kernel)
	}
	if r.Stride == 0 {
		r.Stride = 1
		if r.Kind == MaxPool {
			r.Stride = r.Kernel
		}
	}
	h, w := r.in.h+2*r.Padding-r.Kernel, r.in.w+2*r.Padding-r.Kernel
	if h < 0 || w < 0 {
		return fmt.Errorf("a window of %d does not fit into %dx%d with padding %d", r.Kernel, r.in.h, r.in.w, r.Padding)
	}
	r.out.h, r.out.w = h/r.Stride+1, w/r.Stride+1
	if r.Kind == Conv2D {
		r.out.c = r.Out
		if err := r.weigh(r.in.c * r.Kernel * r.Kernel); err != nil {
			return err
		}
	}
	_, outFits := volume(r.out.c, r.out.h, r.out.w)
	_, inFits := volume(r.in.c, r.in.h+2*r.Padding, r.in.w+2*r.Padding)
	if !outFits || !inFits {
		return fmt.Errorf("its output %dx%dx%d is too large, at most %d numbers are allowed", r.out.c, r.out.h, r.out.w, MaxActivations)
	}
	return nil
}

// weigh checks the number of weights. The kernels keep them with the outputs
// rounded up to a multiple of 16, so that is what counts.
func (r *resolved) weigh(inputs int) error {
	if (int64(r.Out)+15)/16*16*int64(inputs) > MaxParams {
		return fmt.Errorf("has more than %d weights", MaxParams)
	}
	return nil
}

// quote shortens outside text for an error message.
func quote(s string) string {
	if len(s) > maxName {
		s = s[:maxName] + "..."
	}
	return fmt.Sprintf("%q", s)
}

// builtin returns the built-in models, all for 10 classes of 1x28x28 images.
func builtin() map[string][]LayerSpec {
	return map[string][]LayerSpec{
		"logistic": {
			{Kind: Flatten},
			{Kind: Linear, Out: 10},
		},
		"mlp": {
			{Kind: Flatten},
			{Kind: Linear, Out: 256}, {Kind: ReLU},
			{Kind: Linear, Out: 128}, {Kind: ReLU},
			{Kind: Linear, Out: 10},
		},
		"lenet5": {
			{Kind: Conv2D, Out: 6, Kernel: 5, Padding: 2}, {Kind: ReLU}, {Kind: MaxPool, Kernel: 2},
			{Kind: Conv2D, Out: 16, Kernel: 5}, {Kind: ReLU}, {Kind: MaxPool, Kernel: 2},
			{Kind: Flatten},
			{Kind: Linear, Out: 120}, {Kind: ReLU},
			{Kind: Linear, Out: 84}, {Kind: ReLU},
			{Kind: Linear, Out: 10},
		},
		"cnn": {
			{Kind: Conv2D, Out: 32, Kernel: 5, Padding: 2}, {Kind: ReLU}, {Kind: MaxPool, Kernel: 2},
			{Kind: Conv2D, Out: 64, Kernel: 5, Padding: 2}, {Kind: ReLU}, {Kind: MaxPool, Kernel: 2},
			{Kind: Flatten},
			{Kind: Linear, Out: 128}, {Kind: ReLU},
			{Kind: Linear, Out: 10},
		},
	}
}

// Names returns the names of the built-in models, sorted.
func Names() []string {
	var names []string
	for name := range builtin() {
		names = append(names, name)
	}
	sort.Strings(names)
	return names
}

// Builtin returns the built-in model of that name, for 28x28 images with one
// channel and 10 classes. The error for an unknown name lists the names, the
// nearest first.
func Builtin(name string) (Spec, error) {
	layers, ok := builtin()[name]
	if !ok {
		names := Names()
		spell.Sort(names, name)
		return Spec{}, fmt.Errorf("unknown model %s, have %s", quote(name), strings.Join(names, ", "))
	}
	return Spec{Name: name, Input: []int{1, 28, 28}, Classes: 10, Layers: layers}, nil
}
