package tensordb

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spirt-ml/spirt/internal/kernel"
	"github.com/spirt-ml/spirt/optim"
	"github.com/spirt-ml/spirt/tensor"
)

// The groups of commands.
const (
	groupConnection = "Connection and server"
	groupKeys       = "Keys"
	groupTensors    = "Tensors"
	groupAverages   = "Averaging"
	groupArithmetic = "Arithmetic"
	groupUpdate     = "Updating"
	groupTrain      = "Training in the database"
	groupRedisAI    = "RedisAI"
)

// table is made when it is needed first: an instance of a function never does.
var table struct {
	once   sync.Once
	list   []*Command
	byName map[string]*Command
}

func commandTable() []*Command {
	table.once.Do(func() {
		table.list = slices.Concat(connectionCommands(), keyCommands(), tensorCommands(), averageCommands(), arithmeticCommands(), updateCommands(), trainCommands(), redisAICommands())
		table.byName = make(map[string]*Command)
		for _, cmd := range table.list {
			table.byName[cmd.Name] = cmd
		}
	})
	return table.list
}

func tensorCommands() []*Command {
	return []*Command{
		{
			Name: "TENSOR.SET", Args: "key dtype rank dim ... bytes", Group: groupTensors, Complexity: "O(n)",
			Summary: "Stores a tensor. There are `rank` dimensions, and as many bytes as they say, row-major and little endian.",
			Reply:   "the version",
			Min:     5, Max: 5 + tensor.MaxRank, Access: All, Payload: true, FirstKey: 1, LastKey: 1, run: runSet,
		}, {
			Name: "TENSOR.GET", Args: "key [IFNOT version]", Group: groupTensors, Complexity: "O(n)",
			Summary: "Reads a tensor; with IFNOT only if it is of another version.",
			Reply:   "array: dtype, array of dimensions, version, bytes; nil if it is still of this version",
			Min:     2, Max: 4, FirstKey: 1, LastKey: 1, run: runGet,
		}, {
			Name: "TENSOR.META", Args: "key", Group: groupTensors, Complexity: "O(1)",
			Summary: "Tells what is known of a tensor beside its bytes. `kind` is gradient for what may be dropped where memory is short and is not replicated, else parameter.",
			Reply:   "map: dtype, shape, version, step, kind, bytes",
			Min:     2, Max: 2, FirstKey: 1, LastKey: 1, run: runMeta,
		}, {
			Name: "TENSOR.ROWS", Args: "key row [row ...]", Group: groupTensors, Complexity: "O(size of the rows)",
			Summary: "Reads rows, indices of the first dimension from 0.",
			Reply:   "bytes of the rows, one after the other",
			Min:     3, FirstKey: 1, LastKey: 1, run: runGetRows,
		}, {
			Name: "TENSOR.RANGE", Args: "key start count", Group: groupTensors, Complexity: "O(count)",
			Summary: "Reads bytes of a tensor, from byte `start`.",
			Reply:   "array: version, bytes; fewer than `count` at the end",
			Min:     4, Max: 4, FirstKey: 1, LastKey: 1, run: runGetRange,
		}, {
			Name: "TENSOR.HASH", Args: "key", Group: groupTensors, Complexity: "O(n)",
			Summary: "Names the bytes of a tensor by the tree hash of the protocol (BLAKE3 in chunks of 256 KiB).",
			Reply:   "64 hexadecimal digits",
			Min:     2, Max: 2, FirstKey: 1, LastKey: 1, run: runHash,
		}, {
			Name: "TENSOR.COPY", Args: "destination source", Group: groupTensors, Complexity: "O(1) in memory, O(n) in Redis",
			Summary: "Copies a tensor with its step and kind.",
			Reply:   "OK",
			Min:     3, Max: 3, Access: All, FirstKey: 1, LastKey: 2, run: func(c *Call) error {
				if err := c.DB.Copy(c.arg(0), c.arg(1)); err != nil {
					return err
				}
				return c.ok()
			},
		}, {
			Name: "TENSOR.RENAME", Args: "destination source", Group: groupTensors, Complexity: "O(1)",
			Summary: "Gives a tensor another name; what had that name is gone.",
			Reply:   "OK",
			Min:     3, Max: 3, Access: All, FirstKey: 1, LastKey: 2, run: func(c *Call) error {
				if err := c.DB.Rename(c.arg(0), c.arg(1)); err != nil {
					return err
				}
				return c.ok()
			},
		}, {
			Name: "TENSOR.SLICE", Args: "destination source start stop", Group: groupTensors, Complexity: "O(size of the rows)",
			Summary: "Stores rows `start` to `stop`-1 of a tensor as another.",
			Reply:   "OK",
			Min:     5, Max: 5, Access: All, FirstKey: 1, LastKey: 2, run: runSlice,
		}, {
			Name: "TENSOR.CAST", Args: "destination source dtype", Group: groupTensors, Complexity: "O(n)",
			Summary: "Stores a tensor with another element type. Floats are rounded to nearest, ties to even; floats become integers by dropping the fraction; what is out of range becomes the nearest number there is, NaN becomes 0.",
			Reply:   "OK",
			Min:     4, Max: 4, Access: All, FirstKey: 1, LastKey: 2, run: func(c *Call) error {
				dtype, err := tensor.ParseDType(c.arg(2))
				if err != nil {
					return refuse("WRONGTYPE", "%v", err)
				}
				if err := c.DB.Cast(c.arg(0), c.arg(1), dtype); err != nil {
					return err
				}
				return c.ok()
			},
		}, {
			Name: "TENSOR.STEP", Args: "key step", Group: groupTensors, Complexity: "O(1)",
			Summary: "Notes that a tensor is the state of an optimizer after so many steps: for a state that comes from elsewhere.",
			Reply:   "OK",
			Min:     3, Max: 3, Access: All, FirstKey: 1, LastKey: 1, run: func(c *Call) error {
				step, err := unsigned("step", c.Args[1])
				if err != nil {
					return err
				}
				if err := c.DB.SetStep(c.arg(0), step); err != nil {
					return err
				}
				return c.ok()
			},
		}, {
			Name: "TENSOR.KIND", Args: "key GRADIENT|PARAMETER", Group: groupTensors, Complexity: "O(1)",
			Summary: "Says whether a tensor may be dropped where memory is short and need not be replicated. Averages, and what is made of gradients alone, are gradients; all else is a parameter.",
			Reply:   "OK",
			Min:     3, Max: 3, Access: All, FirstKey: 1, LastKey: 1, run: func(c *Call) error {
				kind := strings.ToUpper(c.arg(1))
				if kind != "GRADIENT" && kind != "PARAMETER" {
					return c.usage()
				}
				if err := c.DB.SetGradient(c.arg(0), kind == "GRADIENT"); err != nil {
					return err
				}
				return c.ok()
			},
		}, {
			Name: "TENSOR.WAIT", Args: "key version milliseconds", Group: groupTensors, Complexity: "O(1)",
			Summary: "Waits until a tensor has another version than this, 0 for no tensor, for at most an hour.",
			Reply:   "the version, or nil when the time is over",
			Min:     4, Max: 4, FirstKey: 1, LastKey: 1, Waits: true, run: runWaitFor,
		}, {
			Name: "TENSOR.DEL", Args: "key [key ...]", Group: groupTensors, Complexity: "O(number of keys)",
			Summary: "Removes tensors and accumulators.",
			Reply:   "how many there were",
			Min:     2, Access: All, FirstKey: 1, LastKey: -1, run: runDel,
		},
	}
}

func averageCommands() []*Command {
	return []*Command{
		{
			Name: "TENSOR.ACCUMULATOR", Args: "key length minibatches window", Group: groupAverages, Complexity: "O(minibatches)",
			Summary: "Makes an empty sum for gradients of `length` float32, replacing one of that name. Up to `window` gradients may wait for an earlier one. It lies in the process's memory and is gone after a restart. Name it by round, so that a straggler of an old round does not find it.",
			Reply:   "OK",
			Min:     5, Max: 5, Access: All, FirstKey: 1, LastKey: 1, run: runNewAccumulator,
		}, {
			Name: "TENSOR.ACCUMULATE", Args: "key minibatch bytes", Group: groupAverages, Complexity: "O(n)",
			Summary: "Adds a gradient to a sum: in minibatch order, whatever the order in which they arrive, and each minibatch once, however often it is sent.",
			Reply:   "COUNTED; BUFFERED: it waits for an earlier one; DUPLICATE: it had arrived before, nothing changed",
			Min:     4, Max: 4, Access: Function, Payload: true, FirstKey: 1, LastKey: 1, run: runAccumulate,
		}, {
			Name: "TENSOR.SKIP", Args: "key minibatch", Group: groupAverages, Complexity: "O(n) for each gradient that waited",
			Summary: "Leaves a minibatch that failed for good out of a sum; one that has arrived stays in.",
			Reply:   "OK",
			Min:     3, Max: 3, Access: All, FirstKey: 1, LastKey: 1, run: runSkip,
		}, {
			Name: "TENSOR.AVERAGE", Args: "destination key", Group: groupAverages, Complexity: "O(n)",
			Summary: "Stores a sum divided by the number of gradients in it, as a float32 vector. All minibatches must be counted or skipped. The sum stays.",
			Reply:   "how many gradients are in the average",
			Min:     3, Max: 3, Access: All, FirstKey: 1, LastKey: 2, run: runAverage,
		}, {
			Name: "TENSOR.MEAN", Args: "destination key [key ...]", Group: groupAverages, Complexity: "O(n * number of keys)",
			Summary: "Stores the mean of tensors of one shape, all float32 or all float16, added in the order given, as float32.",
			Reply:   "OK",
			Min:     3, Access: All, FirstKey: 1, LastKey: -1, run: aggregate((*DB).meanOf),
		}, {
			Name: "TENSOR.WMEAN", Args: "destination weight key [weight key ...]", Group: groupAverages, Complexity: "O(n * number of keys)",
			Summary: "Stores the mean with weights, whole numbers from 1 to 16,777,216: the sum of weight times tensor, divided by the sum of the weights. Where all weights are equal it is TENSOR.MEAN, bit for bit.",
			Reply:   "OK",
			Min:     4, Access: All, FirstKey: 1, LastKey: -1, KeyStep: 2, run: runWeightedMean,
		}, {
			Name: "TENSOR.MEDIAN", Args: "destination key [key ...]", Group: groupAverages, Complexity: "O(n * m log m) for m keys",
			Summary: "Stores the median of tensors of one shape, coordinate by coordinate; of an even number of tensors it is the mean of the middle two (Yin et al. 2018).",
			Reply:   "OK",
			Min:     3, Access: All, FirstKey: 1, LastKey: -1, run: aggregate((*DB).Median),
		}, {
			Name: "TENSOR.TRIMMEDMEAN", Args: "f destination key [key ...]", Group: groupAverages, Complexity: "O(n * m log m) for m keys",
			Summary: "Stores the mean of what is left in each coordinate without the f smallest and the f largest values (Yin et al. 2018). There must be more than 2f tensors.",
			Reply:   "OK",
			Min:     4, Access: All, FirstKey: 2, LastKey: -1, run: runTrimmedMean,
		},
	}
}

func arithmeticCommands() []*Command {
	two := func(name, summary string, f func(db *DB, a, b string) (float64, error)) *Command {
		return &Command{
			Name: name, Args: "key key", Group: groupArithmetic, Complexity: "O(n)", Summary: summary, Reply: "a double",
			Min: 3, Max: 3, FirstKey: 1, LastKey: 2, run: func(c *Call) error { return double(c)(f(c.DB, c.arg(0), c.arg(1))) },
		}
	}
	return []*Command{
		{
			Name: "TENSOR.SUM", Args: "destination key [key ...]", Group: groupArithmetic, Complexity: "O(n * number of keys)",
			Summary: "Stores the sum of tensors of one shape, added in the order given.",
			Reply:   "OK",
			Min:     3, Access: All, FirstKey: 1, LastKey: -1, run: aggregate((*DB).Sum),
		}, {
			Name: "TENSOR.SCALE", Args: "destination alpha key", Group: groupArithmetic, Complexity: "O(n)",
			Summary: "Stores alpha times a float32 tensor.",
			Reply:   "OK",
			Min:     4, Max: 4, Access: All, FirstKey: 1, LastKey: 3, KeyStep: 2, run: func(c *Call) error {
				alpha, err := float("alpha", c.Args[1])
				if err != nil {
					return err
				}
				if err := c.DB.Scale(c.arg(0), alpha, c.arg(2)); err != nil {
					return err
				}
				return c.ok()
			},
		}, {
			Name: "TENSOR.AXPY", Args: "destination x y alpha", Group: groupArithmetic, Complexity: "O(n)",
			Summary: "Stores alpha*x + y of float32 tensors of one length, product and sum rounded apart.",
			Reply:   "OK",
			Min:     5, Max: 5, Access: All, FirstKey: 1, LastKey: 3, run: func(c *Call) error {
				alpha, err := float("alpha", c.Args[3])
				if err != nil {
					return err
				}
				if err := c.DB.Axpy(c.arg(0), alpha, c.arg(1), c.arg(2)); err != nil {
					return err
				}
				return c.ok()
			},
		}, {
			Name: "TENSOR.CLIP", Args: "destination source norm", Group: groupArithmetic, Complexity: "O(n)",
			Summary: "Stores a float32 tensor, scaled down so that its Euclidean norm is at most `norm`.",
			Reply:   "the norm that the source has, a double",
			Min:     4, Max: 4, Access: All, FirstKey: 1, LastKey: 2, run: func(c *Call) error {
				limit, err := float("norm", c.Args[2])
				if err != nil {
					return err
				}
				return double(c)(c.DB.Clip(c.arg(0), c.arg(1), limit))
			},
		}, {
			Name: "TENSOR.NORM", Args: "key", Group: groupArithmetic, Complexity: "O(n)",
			Summary: "Returns the Euclidean norm of a float32 tensor. Sums are in float64, in a fixed order: the same bits on every CPU.",
			Reply:   "a double",
			Min:     2, Max: 2, FirstKey: 1, LastKey: 1, run: func(c *Call) error { return double(c)(c.DB.Norm(c.arg(0))) },
		},
		two("TENSOR.DOT", "Returns the inner product of two float32 tensors of one length.", (*DB).Dot),
		two("TENSOR.COSINE", "Returns the cosine of the angle between two float32 tensors of one length, 0 where one of them has no length.", (*DB).Cosine),
		{
			Name: "TENSOR.QUANTISE", Args: "destination source", Group: groupArithmetic, Complexity: "O(n)",
			Summary: "Stores a float32 tensor as int8 in blocks of 256, each with a scale of its own (Dettmers et al. 2022, linear): an int8 tensor of shape [blocks, 260], whose rows start with the scale as a little-endian float32. For float16 and bfloat16 use TENSOR.CAST.",
			Reply:   "OK",
			Min:     3, Max: 3, Access: All, FirstKey: 1, LastKey: 2, run: func(c *Call) error {
				if err := c.DB.Quantise(c.arg(0), c.arg(1)); err != nil {
					return err
				}
				return c.ok()
			},
		}, {
			Name: "TENSOR.DEQUANTISE", Args: "destination source dim [dim ...]", Group: groupArithmetic, Complexity: "O(n)",
			Summary: "Stores what TENSOR.QUANTISE made of a tensor as float32 of the shape that it had.",
			Reply:   "OK",
			Min:     4, Max: 3 + tensor.MaxRank, Access: All, FirstKey: 1, LastKey: 2, run: func(c *Call) error {
				dims, err := shape(c.Args[2:])
				if err != nil {
					return err
				}
				if err := c.DB.Dequantise(c.arg(0), c.arg(1), dims); err != nil {
					return err
				}
				return c.ok()
			},
		},
	}
}

func updateCommands() []*Command {
	return []*Command{{
		Name: "TENSOR.UPDATE", Args: "parameters state gradient STEP n optimizer LR x [option value ...]", Group: groupUpdate, Complexity: "O(n)",
		Summary: "Applies a gradient to parameters as step n of an optimizer, once however often it is asked for. Parameters and gradient are float32 of one length. The state is made by the first step and remembers it: n must be that step, and nothing happens, or the one that follows. " +
			"Parameters and state change at one moment, and the result is the same bits on every CPU. Optimizers and options are those below.",
		Reply: "1 if the step was applied, 0 if it had been applied before",
		Min:   9, Max: 40, Access: All, FirstKey: 1, LastKey: 3, run: func(c *Call) error {
			return runUpdate(c, UpdateKeys{Params: c.arg(0), State: c.arg(1), Gradient: c.arg(2)}, c.strings(3))
		},
	}, {
		Name: "TENSOR.UPDATEINTO", Args: "newparameters newstate parameters state gradient STEP n optimizer LR x [option value ...]", Group: groupUpdate, Complexity: "O(n)",
		Summary: "Does the same and stores the results elsewhere: the old parameters and state stay. It is the new state that remembers: where it is of step n already and the old one of the step before, nothing happens.",
		Reply:   "1 if the step was applied, 0 if it had been applied before",
		Min:     11, Max: 42, Access: All, FirstKey: 1, LastKey: 5, run: func(c *Call) error {
			return runUpdate(c, UpdateKeys{IntoParams: c.arg(0), IntoState: c.arg(1), Params: c.arg(2), State: c.arg(3), Gradient: c.arg(4)}, c.strings(5))
		},
	}}
}

// double replies with a number and returns the error.
func double(c *Call) func(float64, error) error {
	return func(x float64, err error) error {
		if err == nil {
			c.Reply.Double(x)
		}
		return err
	}
}

// aggregate is a command whose arguments are a destination and sources.
func aggregate(f func(db *DB, dst string, keys []string) error) func(*Call) error {
	return func(c *Call) error {
		if err := f(c.DB, c.arg(0), c.strings(1)); err != nil {
			return err
		}
		return c.ok()
	}
}

func (db *DB) meanOf(dst string, keys []string) error { return db.Mean(dst, keys, nil) }

func runDel(c *Call) error {
	c.Reply.Int(int64(c.DB.Delete(c.strings(0)...)))
	return nil
}

// set reads the tensor into the memory where it stays.
func runSet(c *Call) error {
	key := c.arg(0)
	if err := checkKey(key); err != nil {
		return err
	}
	dtype, err := tensor.ParseDType(c.arg(1))
	if err != nil {
		return refuse("WRONGTYPE", "%v", err)
	}
	rank, err := number("rank", c.Args[2], 0, tensor.MaxRank)
	if err != nil {
		return err
	}
	if len(c.Args) != 3+rank {
		return refuse("ERR", "rank %d, but %d dimensions", rank, len(c.Args)-3)
	}
	dims, err := shape(c.Args[3:])
	if err != nil {
		return err
	}
	want, err := tensor.DataLen(dtype, dims)
	if err != nil {
		return refuse("TOOLARGE", "%v", err)
	}
	size, err := c.Payload.Size()
	if err != nil {
		return err
	}
	if size != want {
		return refuse("WRONGTYPE", "a %v tensor of shape %v has %d bytes, not %d", dtype, dims, want, size)
	}
	b, err := c.DB.space.Alloc(size)
	if err != nil {
		return fmt.Errorf("setting %q: %w", key, err)
	}
	if err := c.Payload.Read(b.Data(), nil); err != nil {
		b.Release()
		return err
	}
	version, err := c.DB.space.Put(key, Meta{DType: dtype, Shape: dims}, b)
	if err != nil {
		return err
	}
	c.Reply.Int(int64(version))
	return nil
}

func runGet(c *Call) error {
	if len(c.Args) > 1 {
		if len(c.Args) != 3 || !strings.EqualFold(c.arg(1), "IFNOT") {
			return c.usage()
		}
		have, err := strconv.ParseUint(c.arg(2), 10, 64)
		if err != nil {
			return refuse("ERR", "version %.32q is not a number", c.Args[2])
		}
		m, err := c.DB.Stat(c.arg(0))
		if err != nil {
			return err
		}
		if have == m.Version {
			c.Reply.Nil()
			return nil
		}
	}
	ref, err := c.DB.Get(c.arg(0))
	if err != nil {
		return err
	}
	defer ref.Release()
	t := ref.Tensor()
	if int64(len(t.Data)) > c.MaxReply {
		return refuse("TOOLARGE", "%q has %d bytes, replies have at most %d: read it by TENSOR.RANGE", c.Args[0], len(t.Data), c.MaxReply)
	}
	c.Reply.Array(4)
	c.Reply.Text(t.DType.String())
	c.dims(t.Shape)
	c.Reply.Int(int64(ref.Version()))
	return c.Reply.Tensor(t.Data)
}

func (c *Call) dims(shape []int) {
	c.Reply.Array(len(shape))
	for _, d := range shape {
		c.Reply.Int(int64(d))
	}
}

func runMeta(c *Call) error {
	m, err := c.DB.Stat(c.arg(0))
	if err != nil {
		return err
	}
	kind := "parameter"
	if m.Gradient {
		kind = "gradient"
	}
	c.Reply.Map(6)
	c.Reply.Text("dtype")
	c.Reply.Text(m.DType.String())
	c.Reply.Text("shape")
	c.dims(m.Shape)
	c.Reply.Text("version")
	c.Reply.Int(int64(m.Version))
	c.Reply.Text("step")
	c.Reply.Int(int64(m.Step))
	c.Reply.Text("kind")
	c.Reply.Text(kind)
	c.Reply.Text("bytes")
	c.Reply.Int(int64(m.Len() * m.DType.Size()))
	return nil
}

func runGetRows(c *Call) error {
	indices := make([]int, len(c.Args)-1)
	for i, arg := range c.Args[1:] {
		var err error
		if indices[i], err = number("row", arg, 0, math.MaxInt); err != nil {
			return err
		}
	}
	m, err := c.DB.Stat(c.arg(0))
	if err != nil {
		return err
	}
	size, err := rowSize(c.arg(0), m)
	if err != nil {
		return err
	}
	if int64(len(indices)) > c.MaxReply/int64(max(size, 1)) {
		return refuse("TOOLARGE", "%d rows of %d bytes, replies have at most %d bytes", len(indices), size, c.MaxReply)
	}
	rows, err := c.DB.Rows(nil, c.arg(0), indices)
	if err != nil {
		return err
	}
	return c.Reply.Tensor(rows)
}

func runGetRange(c *Call) error {
	start, err := number("start", c.Args[1], 0, math.MaxInt)
	if err != nil {
		return err
	}
	count, err := number("count", c.Args[2], 0, int(min(c.MaxReply, math.MaxInt)))
	if err != nil {
		return err
	}
	part, err := c.DB.Range(c.arg(0), start, count)
	if err != nil {
		return err
	}
	defer part.Release()
	c.Reply.Array(2)
	c.Reply.Int(int64(part.Version()))
	return c.Reply.Tensor(part.data)
}

func runHash(c *Call) error {
	h, err := c.DB.Hash(c.arg(0))
	if err != nil {
		return err
	}
	c.Reply.Text(h.String())
	return nil
}

func runSlice(c *Call) error {
	var at [2]int
	for i, what := range []string{"start", "stop"} {
		var err error
		if at[i], err = number(what, c.Args[2+i], 0, math.MaxInt); err != nil {
			return err
		}
	}
	if err := c.DB.Slice(c.arg(0), c.arg(1), at[0], at[1]); err != nil {
		return err
	}
	return c.ok()
}

func runNewAccumulator(c *Call) error {
	var numbers [3]int
	for i, what := range []string{"length", "minibatches", "window"} {
		var err error
		if numbers[i], err = number(what, c.Args[1+i], 0, math.MaxInt32); err != nil {
			return err
		}
	}
	if err := c.DB.Accumulator(c.arg(0), numbers[0], numbers[1], numbers[2]); err != nil {
		return err
	}
	return c.ok()
}

// accumulate reads the gradient into the memory that is summed, and looks for
// numbers that are not finite while they are in the cache.
func runAccumulate(c *Call) error {
	minibatch, err := number("minibatch", c.Args[1], 0, maxMinibatches)
	if err != nil {
		return err
	}
	a, err := c.DB.accumulator(c.arg(0))
	if err != nil {
		return err
	}
	size, err := c.Payload.Size()
	if err != nil {
		return err
	}
	duplicate, err := a.check(minibatch, size)
	if err != nil {
		return err
	}
	if duplicate {
		return c.status(Duplicate)
	}
	bad, value := -1, float32(0)
	check := func(part []byte, offset int) {
		f := floats(part)
		if i := kernel.FirstNonFinite(f); i >= 0 && bad < 0 {
			bad, value = offset/4+i, f[i]
		}
	}
	var b *blob
	if held, ok := c.Payload.(Held); ok {
		b = foreign(held.Hold())
		check(b.data, 0)
	} else {
		if b, err = c.DB.alloc(size); err != nil {
			return fmt.Errorf("accumulating minibatch %d in %q: %w", minibatch, a.key, err)
		}
		err = c.Payload.Read(b.data, check)
	}
	if err == nil && bad >= 0 {
		err = a.notFinite(minibatch, bad, value)
	}
	if err != nil {
		b.release()
		return err
	}
	status, err := a.put(&c.DB.mem, minibatch, b)
	if err != nil {
		return err
	}
	return c.status(status)
}

func (c *Call) status(s Status) error {
	c.Reply.Simple(strings.ToUpper(s.String()))
	return nil
}

func runSkip(c *Call) error {
	minibatch, err := number("minibatch", c.Args[1], 0, maxMinibatches)
	if err != nil {
		return err
	}
	if err := c.DB.Skip(c.arg(0), minibatch); err != nil {
		return err
	}
	return c.ok()
}

func runAverage(c *Call) error {
	counted, err := c.DB.Average(c.arg(0), c.arg(1))
	if err != nil {
		return err
	}
	c.Reply.Int(int64(counted))
	return nil
}

func runWeightedMean(c *Call) error {
	if len(c.Args)%2 == 0 {
		return c.usage()
	}
	var keys []string
	var weights []uint32
	for i := 1; i < len(c.Args); i += 2 {
		w, err := number("weight", c.Args[i], 1, maxWeight)
		if err != nil {
			return err
		}
		keys, weights = append(keys, c.arg(i+1)), append(weights, uint32(w))
	}
	if err := c.DB.Mean(c.arg(0), keys, weights); err != nil {
		return err
	}
	return c.ok()
}

func runTrimmedMean(c *Call) error {
	f, err := number("f", c.Args[0], 0, maxSources)
	if err != nil {
		return err
	}
	if err := c.DB.TrimmedMean(c.arg(1), c.strings(2), f); err != nil {
		return err
	}
	return c.ok()
}

func runUpdate(c *Call, k UpdateKeys, rest []string) error {
	step, config, err := readStep(c, rest)
	if err != nil {
		return err
	}
	applied, err := c.DB.Update(k, step, config)
	if err != nil {
		return err
	}
	n := int64(0)
	if applied {
		n = 1
	}
	c.Reply.Int(n)
	return nil
}

// readStep reads STEP n and an optimizer.
func readStep(c *Call, args []string) (uint64, optim.Config, error) {
	if len(args) < 3 || !strings.EqualFold(args[0], "STEP") {
		return 0, optim.Config{}, c.usage()
	}
	step, err := unsigned("step", []byte(args[1]))
	if err != nil {
		return 0, optim.Config{}, err
	}
	config, err := optim.ParseArgs(args[2:])
	if err != nil {
		return 0, config, refuse("ERR", "%v", err)
	}
	return step, config, nil
}

func runWaitFor(c *Call) error {
	version, err := unsigned("version", c.Args[1])
	if err != nil {
		return err
	}
	ms, err := number("milliseconds", c.Args[2], 0, maxWait)
	if err != nil {
		return err
	}
	return c.wait(version, ms)
}

// maxWait bounds TENSOR.WAIT in milliseconds.
const maxWait = 3_600_000

// wait replies with the version once it is another one.
func (c *Call) wait(version uint64, ms int) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(ms)*time.Millisecond)
	defer cancel()
	if done := c.Done; done != nil { // c is used again for the next command
		go func() {
			select {
			case <-done:
				cancel()
			case <-ctx.Done():
			}
		}()
	}
	now, err := c.DB.Wait(ctx, c.arg(0), version)
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		c.Reply.Nil()
		return nil
	case err != nil:
		return err
	}
	c.Reply.Int(int64(now))
	return nil
}
