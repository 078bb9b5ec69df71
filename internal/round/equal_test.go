package round

import (
	"reflect"
	"testing"
)

// Whatever differs between two records, they are not equal, as their IDs are
// not.
func TestRecordEqual(t *testing.T) {
	full := func() *Record {
		return &Record{Slot: 2, Height: 1, Set: []Entry{{Peer: 1}}, Expelled: []Peer{3}}
	}
	if !full().equal(full()) {
		t.Error("a record is not equal to itself")
	}
	for i := range reflect.TypeFor[Record]().NumField() {
		r := full()
		change(reflect.ValueOf(r).Elem().Field(i))
		if name := reflect.TypeFor[Record]().Field(i).Name; r.equal(full()) || full().equal(r) {
			t.Errorf("%s does not count", name)
		}
	}
}

// change changes the last number in v.
func change(v reflect.Value) {
	switch v.Kind() {
	case reflect.Struct:
		change(v.Field(v.NumField() - 1))
	case reflect.Slice, reflect.Array:
		change(v.Index(v.Len() - 1))
	case reflect.Int64:
		v.SetInt(v.Int() + 1)
	default:
		v.SetUint(v.Uint() + 1)
	}
}
