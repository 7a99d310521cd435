package policy

import (
	"cmp"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
)

// Change is one key of the document that differs. Old is empty for a key that
// is new, New for one that is gone; values are written as in TOML.
type Change struct {
	Section string
	Key     string // below the section: "retry_max", `provider["orange"].limit["connections/source"].max`
	Old     string
	New     string
}

// Diff returns what differs between two documents, by section in the order of
// SectionNames and by key in each. Entries of lists are told apart by what
// names them, a stream by tenant, project and name for instance, so moving an
// entry changes nothing and changing one shows that one.
func Diff(from, to *Document) []Change {
	var out []Change
	for _, s := range sections {
		before, after := map[string]string{}, map[string]string{}
		flatten("", reflect.ValueOf(s.of(from)).Elem(), before)
		flatten("", reflect.ValueOf(s.of(to)).Elem(), after)
		first := len(out)
		for _, key := range sortedKeys(before) {
			if before[key] != after[key] {
				out = append(out, Change{Section: s.name, Key: key, Old: before[key], New: after[key]})
			}
		}
		for _, key := range sortedKeys(after) {
			if _, known := before[key]; !known {
				out = append(out, Change{Section: s.name, Key: key, New: after[key]})
			}
		}
		slices.SortFunc(out[first:], func(a, b Change) int { return cmp.Compare(a.Key, b.Key) })
	}
	return out
}

// flatten writes every value below v into out.
func flatten(path string, v reflect.Value, out map[string]string) {
	switch t := v.Type(); {
	case t == reflect.TypeFor[Duration]():
		out[path] = strconv.Quote(v.Interface().(Duration).String())
	case t.Kind() == reflect.Pointer:
		if !v.IsNil() {
			flatten(path, v.Elem(), out)
		}
	case t.Kind() == reflect.Struct:
		inEntry := strings.HasSuffix(path, "]")
		for _, f := range reflect.VisibleFields(t) {
			name := f.Tag.Get("toml")
			field := v.FieldByIndex(f.Index)
			// An entry leaves out what it need not state; a limit of 0 says something.
			if name == "" || inEntry && field.IsZero() && name != "max" {
				continue
			}
			if path != "" {
				name = path + "." + name
			}
			flatten(name, field, out)
		}
	case t.Kind() == reflect.Slice && t.Elem().Kind() == reflect.Struct:
		seen := map[string]int{}
		for i := range v.Len() {
			name := entryName(v.Index(i).Interface())
			if seen[name]++; seen[name] > 1 {
				name += "#" + strconv.Itoa(seen[name])
			}
			flatten(path+"["+strconv.Quote(name)+"]", v.Index(i), out)
		}
	case t.Kind() == reflect.Slice:
		parts := make([]string, v.Len())
		for i := range parts {
			one := map[string]string{}
			flatten("", v.Index(i), one)
			parts[i] = one[""]
		}
		out[path] = "[" + strings.Join(parts, ", ") + "]"
	case t.Kind() == reflect.Map:
		for it := v.MapRange(); it.Next(); {
			flatten(path+"["+strconv.Quote(it.Key().String())+"]", it.Value(), out)
		}
	case t.Kind() == reflect.String:
		out[path] = strconv.Quote(v.String())
	default:
		out[path] = fmt.Sprint(v.Interface())
	}
}

// entryName is what tells an entry of a list from its neighbours.
func entryName(entry any) string {
	switch e := entry.(type) {
	case LimitEntry:
		return e.Name
	case Stream:
		return e.Tenant + "/" + e.Project + "/" + e.Name
	case TenantWeight:
		return e.Name
	case PoolWeights:
		return e.Name
	case Provider:
		return e.Name
	case FeedbackRule:
		return e.Domain + "/" + e.Stream
	case WarmupPlan:
		return e.Name
	case WarmupTrack:
		return e.Class
	case WarmupClass:
		return e.Name
	case WarmupGrowth:
		return strconv.Itoa(e.From)
	case ReflexOf:
		return e.Provider
	case Override:
		return e.Provider + "/" + string(e.Kind) + "/" + string(e.Scope)
	case Limit:
		return string(e.Kind) + "/" + string(e.Scope)
	}
	return ""
}
