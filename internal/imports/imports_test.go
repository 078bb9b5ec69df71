package imports

import (
	"cmp"
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/spirt-ml/spirt"

// A family is a package with the packages below its folder; "." is the root
// package alone. A family imports only from lower layers and from itself.
type family struct {
	layer int
	// external lists what it may import from outside besides the standard
	// library and golang.org/x/sys; nil is nothing, "*" is anything.
	external []string
	// cgo: it may use C, and is not part of the program.
	cgo bool
	// without lists standard packages that it must do without.
	without []string
}

var anything = []string{"*"}

var families = map[string]family{
	"cmd":                  {layer: 7, external: anything},
	"bench":                {layer: 7, external: anything},
	"dashboard":            {layer: 6, external: anything},
	".":                    {layer: 5, external: anything},
	"internal/faults":      {layer: 7, external: anything},
	"internal/sim":         {layer: 4, external: anything},
	"internal/redistest":   {layer: 1},
	"internal/samebits":    {layer: 3},
	"internal/round":       {layer: 3, external: anything, without: []string{"net", "os", "syscall"}},
	"function":             {layer: 2, external: anything},
	"p2p":                  {layer: 2, external: anything},
	"tensordb":             {layer: 2, external: anything},
	"tensordb/redismodule": {layer: 7, cgo: true},
	"dataset":              {layer: 2},
	"nn":                   {layer: 1},
	"optim":                {layer: 1},
	"events":               {layer: 1, external: anything},
	"metrics":              {layer: 2, external: []string{"github.com/prometheus/client_golang"}},
	"chart":                {layer: 2, external: []string{"golang.org/x/image"}},
	"plan":                 {layer: 2},
	"trace":                {layer: 2},
	"tensorboard":          {layer: 2, external: []string{"google.golang.org/protobuf/encoding/protowire"}},
	"bill":                 {layer: 0, external: anything},
	"robust":               {layer: 1},
	"tensor":               {layer: 0},
	"resp":                 {layer: 0},
	"internal/kernel":      {layer: 0},
	"internal/spell":       {layer: -1},
	"internal/treehash":    {layer: 0, external: []string{"github.com/zeebo/blake3"}},
	"internal/membership":  {layer: 1, external: []string{"github.com/fxamacker/cbor", "github.com/zeebo/blake3"}, without: []string{"net", "os", "syscall"}},
	"internal/imports":     {layer: 0},
}

// An edge is one import: from is a package relative to the module's root, to
// an import path.
type edge struct{ from, to string }

// familyOf returns the name of the family that a package belongs to.
func familyOf(pkg string) (string, bool) {
	for name := pkg; name != "." && name != "/"; name = path.Dir(name) {
		if _, ok := families[name]; ok {
			return name, true
		}
	}
	return ".", pkg == "."
}

// faults returns one line for each import that goes the wrong way.
func faults(edges []edge) []string {
	var out []string
	fault := func(e edge, format string, args ...any) {
		to := strings.TrimPrefix(e.to, module+"/")
		out = append(out, fmt.Sprintf("%s imports %s: %s", e.from, to, fmt.Sprintf(format, args...)))
	}
	for _, e := range edges {
		from, ok := familyOf(e.from)
		if !ok {
			fault(e, "%s has no layer, give it one in internal/imports and in ARCHITECTURE.md", e.from)
			continue
		}
		f := families[from]
		if e.to == "C" {
			if f.cgo {
				continue
			}
			fault(e, "the program builds without cgo")
			continue
		}
		if e.to == module || strings.HasPrefix(e.to, module+"/") {
			pkg := cmp.Or(strings.TrimPrefix(strings.TrimPrefix(e.to, module), "/"), ".")
			to, ok := familyOf(pkg)
			switch {
			case !ok:
				fault(e, "%s has no layer, give it one in internal/imports and in ARCHITECTURE.md", pkg)
			case to == from:
			case families[to].layer == f.layer:
				fault(e, "packages of one layer never import each other")
			case families[to].layer > f.layer:
				fault(e, "it is a layer above, imports go down only")
			}
			continue
		}
		first, _, _ := strings.Cut(e.to, "/")
		switch {
		case !strings.Contains(first, "."): // standard library
			if slices.Contains(f.without, first) {
				fault(e, "%s does no input or output", from)
			}
		case e.to == "golang.org/x/sys" || strings.HasPrefix(e.to, "golang.org/x/sys/"):
		case !slices.ContainsFunc(f.external, func(x string) bool {
			return x == "*" || e.to == x || strings.HasPrefix(e.to, x+"/")
		}):
			fault(e, "%s makes do with the standard library and golang.org/x/sys", from)
		}
	}
	return out
}

// edges returns the imports of every file of the module that is no test,
// whatever its build tags. Tests may import sideways, to run the real other
// side. Folders that are modules of their own are left out.
func edges(root string) ([]edge, error) {
	var all []edge
	err := filepath.WalkDir(root, func(file string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := e.Name()
		if e.IsDir() {
			if file == root {
				return nil
			}
			_, err := os.Stat(filepath.Join(file, "go.mod"))
			if err == nil || name == "testdata" || strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_") {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			return nil
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		pkg, err := filepath.Rel(root, filepath.Dir(file))
		if err != nil {
			return err
		}
		for _, spec := range parsed.Imports {
			to, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			all = append(all, edge{filepath.ToSlash(pkg), to})
		}
		return nil
	})
	return all, err
}

const root = "../.."

func TestDirection(t *testing.T) {
	all, err := edges(root)
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 20 {
		t.Fatalf("found %d imports only: looking in the wrong folder", len(all))
	}
	for _, f := range faults(all) {
		t.Error(f)
	}
}

// The test itself must be able to fail.
func TestFaults(t *testing.T) {
	for _, c := range []struct {
		e    edge
		want string
	}{
		{edge{"function/gradient", module + "/tensordb"}, "function/gradient imports tensordb: packages of one layer never import each other"},
		{edge{"tensor", module + "/nn"}, "tensor imports nn: it is a layer above, imports go down only"},
		{edge{"tensor", module + "/internal/kernel"}, "tensor imports internal/kernel: packages of one layer never import each other"},
		{edge{"p2p", module}, "p2p imports " + module + ": it is a layer above, imports go down only"},
		{edge{"util", "fmt"}, "util imports fmt: util has no layer, give it one in internal/imports and in ARCHITECTURE.md"},
		{edge{"nn", module + "/internal/newest"}, "nn imports internal/newest: internal/newest has no layer, give it one in internal/imports and in ARCHITECTURE.md"},
		{edge{"tensordb", "C"}, "tensordb imports C: the program builds without cgo"},
		{edge{"resp", "github.com/redis/go-redis/v9"}, "resp imports github.com/redis/go-redis/v9: resp makes do with the standard library and golang.org/x/sys"},
		{edge{"internal/round", "net/http"}, "internal/round imports net/http: internal/round does no input or output"},
		{edge{"internal/kernel", "golang.org/x/sys/cpu"}, ""},
		{edge{"internal/treehash", "github.com/zeebo/blake3"}, ""},
		{edge{"function/gradient", module + "/function"}, ""},
		{edge{"internal/sim", module + "/internal/round"}, ""},
		{edge{"cmd/spirt", module}, ""},
		{edge{".", module + "/p2p"}, ""},
	} {
		if got := strings.Join(faults([]edge{c.e}), "\n"); got != c.want {
			t.Errorf("%v: %q, want %q", c.e, got, c.want)
		}
	}
}

// The artefact for Lambda and small devices is small because it holds no
// network stack, no command line and no cloud library.
func TestFunctionArtefact(t *testing.T) {
	cmd := exec.Command("go", "list", "-deps", "./cmd/spirt-function")
	cmd.Dir = root
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	deps := strings.Fields(string(out))
	if !slices.Contains(deps, module+"/nn") {
		t.Error("cmd/spirt-function does not link nn")
	}
	for _, dep := range deps {
		for _, heavy := range []string{
			module + "/p2p", module + "/tensordb", module + "/dataset", "github.com/libp2p", "github.com/quic-go",
			"github.com/aws/aws-sdk-go-v2", "github.com/spf13", "github.com/redis", "github.com/prometheus",
		} {
			if dep == heavy || strings.HasPrefix(dep, heavy+"/") {
				t.Errorf("cmd/spirt-function links %s", dep)
			}
		}
	}
}
