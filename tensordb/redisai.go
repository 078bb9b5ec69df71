package tensordb

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
	"strconv"
	"strings"

	"github.com/spirt-ml/spirt/tensor"
)

// This file answers AI.TENSORSET and AI.TENSORGET as RedisAI 1.2 does, with its
// words of refusal, so that its clients go on working. It has no types for
// what they do not have: STRING, and float16 and bfloat16 in replies.

// aiTypes are RedisAI's names of element types.
var aiTypes = []struct {
	name  string
	dtype tensor.DType
}{
	{"FLOAT", tensor.Float32}, {"DOUBLE", tensor.Float64}, {"INT8", tensor.Int8}, {"INT16", tensor.Int16}, {"INT32", tensor.Int32},
	{"INT64", tensor.Int64}, {"UINT8", tensor.Uint8}, {"UINT16", tensor.Uint16}, {"BOOL", tensor.Bool},
}

func redisAICommands() []*Command {
	return []*Command{
		{
			Name: "AI.TENSORSET", Args: "key type [dim ...] [BLOB bytes | VALUES value ...]", Group: groupRedisAI, Complexity: "O(n)",
			Summary: "Stores a tensor of FLOAT, DOUBLE, INT8, INT16, INT32, INT64, UINT8, UINT16 or BOOL; without data, of zeros. As in RedisAI, negative integers come by BLOB only.",
			Reply:   "OK",
			Min:     4, Access: All, Payload: true, FirstKey: 1, LastKey: 1, likeRedis: true, run: runAISet,
		}, {
			Name: "AI.TENSORGET", Args: "key [META] [BLOB | VALUES]", Group: groupRedisAI, Complexity: "O(n)",
			Summary: "Reads a tensor: without more words what META BLOB gives.",
			Reply:   "array: dtype, type, shape, dimensions, and blob with bytes or values with an array; without META bytes or array alone",
			Min:     2, Max: 4, FirstKey: 1, LastKey: 1, likeRedis: true, run: runAIGet,
		},
	}
}

var (
	errAIType   = refuse("ERR", "invalid data type")
	errAIShape  = refuse("ERR", "invalid or negative value found in tensor shape")
	errAIBlob   = refuse("ERR", "a single binary string should come after the BLOB argument in 'AI.TENSORSET' command")
	errAICount  = refuse("ERR", "wrong number of values was given in 'AI.TENSORSET' command")
	errAILength = refuse("ERR", "data length does not match tensor shape and type")
	errAIBool   = refuse("ERR", "BOOL tensor elements must be 0 or 1")
	errAIValue  = refuse("ERR", "invalid value")
	errAIKey    = refuse("WRONGTYPE", "Operation against a key holding the wrong kind of value")
)

// aiWord returns a word in upper case, up to a zero byte as C has it.
func aiWord(b []byte) string {
	b, _, _ = bytes.Cut(b, []byte{0})
	return strings.ToUpper(string(b))
}

// aiInteger reads an integer as Redis does: no sign but a minus, no leading
// zero.
func aiInteger(b []byte) (int64, bool) {
	n, err := strconv.ParseInt(string(b), 10, 64)
	return n, err == nil && strconv.FormatInt(n, 10) == string(b)
}

// aiShape is a shape that is being read.
type aiShape struct {
	dtype tensor.DType
	dims  []int
	bytes int // of all elements
}

// add reads one more dimension.
func (s *aiShape) add(word []byte) error {
	n, ok := aiInteger(word)
	if !ok || n < 1 || n > math.MaxInt || len(s.dims) == tensor.MaxRank {
		return errAIShape
	}
	s.dims = append(s.dims, int(n))
	var err error
	if s.bytes, err = tensor.DataLen(s.dtype, s.dims); err != nil {
		return errAIShape
	}
	return nil
}

func (s *aiShape) elements() int { return s.bytes / s.dtype.Size() }

func runAISet(c *Call) error {
	key := c.arg(0)
	if err := checkKey(key); err != nil {
		return err
	}
	if _, err := c.DB.Stat(key); errors.Is(err, ErrWrongType) {
		return errAIKey
	}
	s := &aiShape{}
	for _, t := range aiTypes {
		if t.name == aiWord(c.Args[1]) {
			s.dtype, s.bytes = t.dtype, t.dtype.Size()
		}
	}
	if s.dtype == 0 {
		return errAIType
	}
	// The payload is the last word, whatever it is.
	words := c.Args[2:]
	for i, w := range words {
		switch aiWord(w) {
		case "BLOB":
			if i != len(words)-1 {
				return errAIBlob
			}
			size, err := c.Payload.Size()
			if err != nil {
				return err
			}
			if size != s.bytes {
				return errAILength
			}
			return c.aiPut(key, s, c.aiBlob)
		case "VALUES":
			if len(words)-i != s.elements() {
				return errAICount
			}
			return c.aiPut(key, s, func(s *aiShape, data []byte) error {
				last, err := c.lastWord()
				if errors.Is(err, errAIShape) { // too long for a number
					return errAIValue
				}
				if err != nil {
					return err
				}
				return aiValues(data, s.dtype, append(words[i+1:], last))
			})
		default:
			if err := s.add(w); err != nil {
				return err
			}
		}
	}
	last, err := c.lastWord()
	if err != nil {
		return err
	}
	switch aiWord(last) {
	case "BLOB":
		return errAIBlob
	case "VALUES":
		return errAICount // there is one element at least
	}
	if err := s.add(last); err != nil {
		return err
	}
	return c.aiPut(key, s, func(_ *aiShape, data []byte) error {
		clear(data)
		return nil
	})
}

// lastWord reads the payload as a word.
func (c *Call) lastWord() ([]byte, error) {
	size, err := c.Payload.Size()
	if err != nil {
		return nil, err
	}
	if size > maxArg {
		return nil, errAIShape
	}
	word := make([]byte, size)
	return word, c.Payload.Read(word, nil)
}

// aiPut stores what fill makes of a shape.
func (c *Call) aiPut(key string, s *aiShape, fill func(s *aiShape, data []byte) error) error {
	if int64(s.bytes) > c.MaxReply { // it could not be read again
		return errAIShape
	}
	b, err := c.DB.space.Alloc(s.bytes)
	if err != nil {
		return err
	}
	if err := fill(s, b.Data()); err != nil {
		b.Release()
		return err
	}
	if _, err := c.DB.space.Put(key, Meta{DType: s.dtype, Shape: s.dims}, b); err != nil {
		return err
	}
	return c.ok()
}

func (c *Call) aiBlob(s *aiShape, data []byte) error {
	if err := c.Payload.Read(data, nil); err != nil {
		return err
	}
	if s.dtype == tensor.Bool {
		for _, x := range data { // RedisAI forgets the last one
			if x > 1 {
				return errAIBool
			}
		}
	}
	return nil
}

// aiValues writes words as numbers.
func aiValues(data []byte, d tensor.DType, words [][]byte) error {
	size := d.Size()
	for i, w := range words {
		to := data[i*size : (i+1)*size]
		if d == tensor.Float32 || d == tensor.Float64 {
			x, ok := aiFloat(string(w))
			if !ok {
				return errAIValue
			}
			if d == tensor.Float32 {
				binary.LittleEndian.PutUint32(to, math.Float32bits(float32(x)))
			} else {
				binary.LittleEndian.PutUint64(to, math.Float64bits(x))
			}
			continue
		}
		most := map[tensor.DType]int64{
			tensor.Int8: math.MaxInt8, tensor.Int16: math.MaxInt16, tensor.Int32: math.MaxInt32, tensor.Int64: math.MaxInt64,
			tensor.Uint8: math.MaxUint8, tensor.Uint16: math.MaxUint16, tensor.Bool: 1,
		}[d]
		n, ok := aiInteger(w)
		if !ok || n < 0 || n > most {
			return errAIValue
		}
		for j := range to {
			to[j] = byte(n >> (8 * j))
		}
	}
	return nil
}

// aiFloat reads a number as C's strtod does in RedisAI: no NaN, and nothing
// beyond the range of a double at either end.
func aiFloat(text string) (float64, bool) {
	if strings.ContainsRune(text, '_') {
		return 0, false
	}
	lower := strings.ToLower(text)
	if strings.Contains(lower, "nan") {
		return 0, false
	}
	hex := strings.HasPrefix(strings.TrimLeft(lower, "+-"), "0x")
	if hex && !strings.Contains(lower, "p") {
		lower += "p0" // an exponent is not asked for in C
	}
	x, err := strconv.ParseFloat(lower, 64)
	if err != nil {
		return 0, false
	}
	mantissa, _, _ := strings.Cut(lower, map[bool]string{true: "p", false: "e"}[hex])
	if x == 0 && strings.ContainsAny(strings.TrimPrefix(strings.TrimLeft(mantissa, "+-"), "0x"), "123456789abcdef") {
		return 0, false // it is too small
	}
	return x, true
}

func runAIGet(c *Call) error {
	m, err := c.DB.Stat(c.arg(0))
	switch {
	case errors.Is(err, ErrWrongType):
		return errAIKey
	case errors.Is(err, ErrNoKey):
		return refuse("ERR", "tensor key is empty or in a different shard")
	case err != nil:
		return err
	}
	var meta, blob, values bool
	for _, w := range c.Args[1:] {
		switch aiWord(w) {
		case "META":
			meta = true
		case "BLOB":
			blob = true
		case "VALUES":
			values = true
		default:
			return refuse("ERR", "unsupported data format")
		}
	}
	switch {
	case blob && values:
		return refuse("ERR", "both BLOB and VALUES specified")
	case !meta && !blob && !values:
		meta, blob = true, true
	}
	name := ""
	for _, t := range aiTypes {
		if t.dtype == m.DType {
			name = t.name
		}
	}
	if name == "" {
		return refuse("ERR", "unsupported dtype: read %v by TENSOR.GET", m.DType)
	}
	const perValue = 32 // bytes of a reply, at most
	var ref *Ref
	if blob || values {
		if ref, err = c.DB.Get(c.arg(0)); err != nil {
			return err
		}
		defer ref.Release()
		if m = ref.Meta(); int64(len(ref.data)) > c.MaxReply || values && int64(m.Len()) > c.MaxReply/perValue {
			return refuse("TOOLARGE", "%q has %d bytes, replies have at most %d: read it by TENSOR.RANGE", c.Args[0], len(ref.data), c.MaxReply)
		}
	}
	if meta {
		parts := 4
		if blob || values {
			parts = 6
		}
		c.Reply.Array(parts)
		c.Reply.Text("dtype")
		c.Reply.Text(name)
		c.Reply.Text("shape")
		c.dims(m.Shape)
	}
	switch {
	case blob:
		if meta {
			c.Reply.Text("blob")
		}
		return c.Reply.Tensor(ref.data)
	case values:
		if meta {
			c.Reply.Text("values")
		}
		c.Reply.Array(m.Len())
		for i := range m.Len() {
			c.aiValue(m.DType, ref.data[i*m.DType.Size():])
		}
	}
	return nil
}

// aiValue replies with the first number of data.
func (c *Call) aiValue(d tensor.DType, data []byte) {
	switch d {
	case tensor.Float32:
		c.Reply.Float17(float64(math.Float32frombits(binary.LittleEndian.Uint32(data))))
	case tensor.Float64:
		c.Reply.Float17(math.Float64frombits(binary.LittleEndian.Uint64(data)))
	case tensor.Int8:
		c.Reply.Int(int64(int8(data[0])))
	case tensor.Int16:
		c.Reply.Int(int64(int16(binary.LittleEndian.Uint16(data))))
	case tensor.Int32:
		c.Reply.Int(int64(int32(binary.LittleEndian.Uint32(data))))
	case tensor.Int64:
		c.Reply.Int(int64(binary.LittleEndian.Uint64(data)))
	case tensor.Uint16:
		c.Reply.Int(int64(binary.LittleEndian.Uint16(data)))
	default: // uint8, bool
		c.Reply.Int(int64(data[0]))
	}
}

// Float17 returns a number with 17 digits, as C's %.17g.
func Float17(x float64) string {
	switch {
	case math.IsNaN(x) && math.Signbit(x):
		return "-nan"
	case math.IsNaN(x):
		return "nan"
	case math.IsInf(x, 1):
		return "inf"
	case math.IsInf(x, -1):
		return "-inf"
	}
	return strconv.FormatFloat(x, 'g', 17, 64)
}
